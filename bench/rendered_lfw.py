"""A recogniser that saw rendered people alone, tested on photographs: how far the rendered set carries at a size that a GPU trains in minutes.

    python bench/rendered_lfw.py train -o RUN [--identities 10000] [--per 30] [--size 64] [--backbone iresnet18] [--epochs 8]
    python bench/rendered_lfw.py test RUN        LFW's development and official pairs (HYPERFACE_DATA), 200 rendered people nobody trained on

`train` renders with every processor, trains with ArcFace (s = 32, m = 0.3, cosine rate: milder than published, for a short training) and the trainer's own augmentation
and leaves the network's weights in float16, in parts of at most 15 MB. LFW's official pairs are for reporting; decisions are made on the development pairs.
"""
import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from hyperface.core import provenance, read_json, write_json
from hyperface.data.pairs import draw_pairs, read_pairs
from hyperface.data.rendered import render_faces
from hyperface.data.store import PixelStore
from hyperface.metrics.verification import kfold_accuracy, roc, tar_at_far
from hyperface.recognition.train import AugmentConfig, RecognitionTrainer, embed_store, recipe

PART = 15_000_000


def fit_in(args, began: float) -> None:
    "Fewer people where rendering all of them would take more than two fifths of the time."
    clock = time.monotonic()
    for n in (80, 480): render_faces(n, args.per, size=args.size, seed=args.seed + 7, processes=args.processes); clock, last = time.monotonic(), clock
    rate = 480 * args.per / (clock - last)                                          # the first set pays for imports elsewhere too
    args.identities = min(args.identities, int(max(.4 * args.seconds - (clock - began), 1) * rate / args.per))
    print(f"{rate:.0f} pictures a second: {args.identities} people", flush=True)


def train(args) -> dict:
    began = all_began = time.monotonic()
    if args.seconds: fit_in(args, all_began)
    began = time.monotonic()
    people = render_faces(args.identities, args.per, size=args.size, seed=args.seed, processes=args.processes)
    rendered = time.monotonic() - began
    print(f"rendered {len(people):,} pictures of {args.size} px in {rendered:.0f} s: {len(people) / rendered:.0f} a second", flush=True)
    unseen = render_faces(100, 10, size=args.size, seed=args.seed + 1)
    make = lambda epochs: recipe("insightface", backbone=args.backbone, margin=args.margin, scale=args.scale, schedule="cosine", image_size=args.size, batch=args.batch, lr=args.lr, epochs=epochs, warmup=min(.5, epochs / 4), checkpoint_every=10**6,
                    augment=AugmentConfig(grey=.2, low=.25, erase=args.erase, brightness=.3, contrast=.3, turn=5.), precision=args.precision)
    if args.seconds:
        trial = RecognitionTrainer(make(100), people, device=args.device)
        trial.fit(stop_at=20); clock = time.monotonic(); trial.fit(stop_at=100)
        rate = 100 * args.batch / (time.monotonic() - clock); del trial
        args.epochs = max(1, int(.88 * (args.seconds - (time.monotonic() - all_began)) * rate / len(people)))
        print(f"{rate:.0f} images a second: {args.epochs} epochs", flush=True)
    config = make(args.epochs)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = RecognitionTrainer(config, people, draw_pairs(unseen, 1000, 1000, 0), device=args.device).fit()
    seconds = time.monotonic() - began
    print(done, f"{seconds:.0f} s, {done.steps * config.batch / seconds:,.0f} images/s with loading", set(str(w.message) for w in told), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu() for k, v in done.network.backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    flat = torch.cat([v.flatten().half() for v in state.values()]).numpy().tobytes()
    for i in range(0, len(flat), PART): (args.out / f"weights-{i // PART}.bin").write_bytes(flat[i:i + PART])
    about = dict(identities=args.identities, per=args.per, size=args.size, backbone=args.backbone, embedding_dim=config.embedding_dim, epochs=args.epochs, batch=config.batch, lr=config.lr, margin=config.margin, scale=config.scale, seed=args.seed, erase=args.erase, precision=done.precision,
                 render_seconds=round(rendered), train_seconds=round(seconds), device=torch.cuda.get_device_name() if next(done.network.parameters()).is_cuda else "cpu", summary=done.summary(), provenance=provenance(),
                 loss=[round(float(x), 3) for x in done.frame()["loss"].iloc[::max(1, done.steps // 60)]], validation=done.validation().to_dict("records"))
    write_json(args.out / "about.json", about)
    return {k: about[k] for k in ("render_seconds", "train_seconds", "device", "summary")}


def load(folder: Path):
    from hyperface.recognition.backbones import create_model
    about = read_json(folder / "about.json")
    net, at = create_model(about["backbone"], embedding_dim=about["embedding_dim"], image_size=about["size"]), 0
    flat = torch.from_numpy(np.frombuffer(b"".join((folder / f"weights-{i}.bin").read_bytes() for i in range(len(list(folder.glob("weights-*.bin"))))), np.float16).astype(np.float32))
    for k, v in net.state_dict().items():
        if not k.endswith("num_batches_tracked"):
            v.copy_(flat[at:at + v.numel()].view(v.shape)); at += v.numel()
    assert at == len(flat)
    return net.eval(), about


def test(args) -> dict:
    from hyperface.core import data_dir
    from hyperface.data.formats import read_dataset
    net, about = load(args.out)
    out, root = {}, data_dir("lfw")
    sets = dict(rendered=draw_pairs(render_faces(200, 10, size=about["size"], seed=about["seed"] + 2), 3000, 3000, 0))
    if root is not None:
        faces = read_dataset(root / "lfw112")
        sets |= {"LFW development": read_pairs(root / "pairsDevTrain.txt", faces).compact(), "LFW": read_pairs(root / "pairs.txt", faces).compact()}
    for name, pairs in sets.items():
        pairs = pairs.compact()
        scores = pairs.scores(embed_store(net, PixelStore(pairs.records, about["size"], memory=float("inf"))))
        folds = pairs.folds if len(np.unique(pairs.folds)) > 1 else np.arange(len(pairs)) % 10
        out[name] = dict(pairs=len(pairs), accuracy=round(100 * float(kfold_accuracy(scores, pairs.labels, folds)), 2), tar_at_1_percent=round(100 * float(tar_at_far(roc(scores, pairs.labels), far=1e-2)), 1))
        print(name, out[name], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "test"))
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    for name, default in (("identities", 10_000), ("per", 30), ("size", 64), ("epochs", 8), ("batch", 256), ("seed", 11)): parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", .1), ("erase", .2), ("margin", .3), ("scale", 32.)): parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--seconds", type=float, default=0., help="for all: fewer people, and as many epochs as fit")
    parser.add_argument("--backbone", default="iresnet18"); parser.add_argument("--precision", default="auto")
    parser.add_argument("--processes", type=int, default=None); parser.add_argument("--device", default=None)
    args = parser.parse_args()
    args.out = args.out or args.run
    if args.out is None: parser.error("name the folder of the run")
    print(json.dumps(dict(train=train, test=test)[args.what](args), default=str))


if __name__ == "__main__":
    main()

"""Training speed on this machine: the trainer against a plainly written loop, in one run, in turns.

    python bench/train.py [--backbone NAME] [--size 48] [--batch 64] [--turns 5] [--steps 6] [--threads N] [--out FILE.json]

Plain: images read and augmented one by one (Pillow), float32, channels first, one thing after the other.
Float32, bf16: the trainer's own batches and steps, channels last, the next batch prepared in a thread while a step runs.
The ways take turns, so that all see the same neighbours on the machine; a ratio is the median over the turns, and processor
time stands beside wall time. What `precision="auto"` takes on this machine is compared with the plain loop: exit code 1
below 1.5.
"""
import argparse, io, json, os, sys, time, warnings

import numpy as np
import torch
import torch.nn.functional as F

os.environ.setdefault("HYPERFACE_PROGRESS", "0")
from hyperface.core import cpu_count, provenance, set_threads, write_json
from hyperface.data.rendered import render_faces
from hyperface.extraction.embed import prefetched
from hyperface.recognition.train import Recogniser, RecognitionTrainer, recipe


def plain_batch(encoded, rows, size, draw):
    "Decode and augment one image after another, as a first version would."
    from PIL import Image, ImageEnhance, ImageFilter
    out = []
    for i in rows:
        x = Image.open(io.BytesIO(encoded[i])).convert("RGB")
        if draw.random() < .5: x = x.transpose(Image.FLIP_LEFT_RIGHT)
        zoom, dx, dy = 1 + .08 * draw.uniform(-1, 1), *(.08 * size * draw.uniform(-.5, .5, 2))
        x = x.transform((size, size), Image.AFFINE, (zoom, 0, dx, 0, zoom, dy), Image.BILINEAR)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color): x = change(x).enhance(1 + .2 * draw.uniform(-1, 1))
        if draw.random() < .1: x = x.filter(ImageFilter.GaussianBlur(1))
        out.append(torch.from_numpy(np.asarray(x, np.float32) / 127.5 - 1).permute(2, 0, 1))
    return torch.stack([x.contiguous() for x in out])


def plain(config, encoded, labels, n, steps):
    "A loop as in a tutorial; yields after every `steps` steps."
    network = Recogniser(config, n).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=.01, momentum=config.momentum, weight_decay=config.weight_decay)
    draw = np.random.default_rng(0)
    while True:
        for _ in range(steps):
            rows = draw.permutation(len(encoded))[:config.batch]
            loss, _ = network(plain_batch(encoded, rows, config.image_size, draw), torch.from_numpy(labels[rows]))
            optimiser.zero_grad(); loss.backward(); optimiser.step(); loss.item()
        yield


def ours(config, records, steps):
    "The trainer's own batches and steps."
    trainer, step = RecognitionTrainer(config, records, device="cpu"), 0
    for found in prefetched(trainer.batch, range(10**6), 1, 3):
        if isinstance(found, Exception): raise found
        trainer.train_step(step, *found); step += 1
        if step % steps == 0: yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet_tiny")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--identities", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    from hyperface.data.images import encode_image
    threads = set_threads(args.threads)
    config = recipe("cpu_quick", backbone=args.backbone, image_size=args.size, batch=args.batch, epochs=10**5)
    records = render_faces(args.identities, 8, size=args.size, seed=7)
    encoded = [encode_image(records.pixels(i), "jpg") for i in range(len(records))]
    ways = dict(plain=plain(config, encoded, records.codes, args.identities, args.steps))
    for precision in ("float32", "bf16"): ways[precision] = ours(recipe("cpu_quick", **{**{k: getattr(config, k) for k in ("backbone", "image_size", "batch", "epochs")}, "precision": precision}), records, args.steps)
    auto = RecognitionTrainer(config, records, device="cpu").precision
    for way in ways.values(): next(way)                                                        # warm
    seen = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            next(way)
            seen[name].append((args.steps * args.batch / (time.perf_counter() - wall), args.steps * args.batch / (time.process_time() - cpu)))
    rates = {name: np.array(v) for name, v in seen.items()}
    print(f"{args.backbone} at {args.size} px, batch {args.batch}, {threads} thread(s) of {cpu_count()}, load {os.getloadavg()[0]:.1f}, {args.turns} turns of {args.steps} steps")
    for name, r in rates.items():
        print(f"{name:8} {np.median(r[:, 0]):7.1f} images/s, {np.median(r[:, 1]):7.1f} a second of processor; ratio to plain {np.median(r[:, 0] / rates['plain'][:, 0]):.2f}, by processor time {np.median(r[:, 1] / rates['plain'][:, 1]):.2f}")
    ratio = float(np.median(rates[auto][:, 0] / rates["plain"][:, 0]))
    print(f"precision='auto' takes {auto} here: {ratio:.2f} times the plain loop (wanted: at least 1.5)")
    result = dict(backbone=args.backbone, size=args.size, batch=args.batch, threads=threads, auto=auto, ratio=ratio, images_per_s={k: float(np.median(v[:, 0])) for k, v in rates.items()}, images_per_cpu_s={k: float(np.median(v[:, 1])) for k, v in rates.items()}, provenance=provenance())
    if args.out: write_json(args.out, result)
    print(json.dumps({k: v for k, v in result.items() if k != "provenance"}))
    sys.exit(ratio < 1.5)


if __name__ == "__main__":
    main()

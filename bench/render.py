"""How fast faces are rendered, and what models trained on photographs make of them.

    python bench/render.py speed                 images/s at 112 and 64 pixels, one and two processes
    python bench/render.py models [--identities 100]   needs HYPERFACE_MODELS: SCRFD, ArcFace, age, gender, expression, pose
    python bench/render.py broken [--identities 200]   the automatic check over identities x 50 pictures
    python bench/render.py task [--identities 1000]    a small network trained for five minutes, 200 unseen people
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time

import numpy as np

from hyperface.core import find_model
from hyperface.data.head import EXPRESSIONS
from hyperface.data.rendered import broken, draw_conditions, draw_identities, make_conditions, render, render_faces

FER = ["anger", "disgust", "fear", "happy", "sad", "surprise", "neutral"]


def session(name: str):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(find_model(name)), options, providers=["CPUExecutionProvider"])


def speed(args) -> dict:
    "Images per second of one process, and of a data set made by two (start of the workers included)."
    out = {}
    for size in (112, 64):
        people, conditions = draw_identities(args.count, 0), draw_conditions(args.count, 1.0, 0)
        render(people[:16], conditions[:16], size)
        clock, cpu = time.perf_counter(), time.process_time()
        render(people, conditions, size, uint8=True)
        wall, used = time.perf_counter() - clock, time.process_time() - cpu
        out[f"{size}px one process"] = round(args.count / wall)
        out[f"{size}px per CPU second"] = round(args.count / used)
        import os
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HYPERFACE_RUNS"] = folder
            render_faces(64, 8, size=size, seed=1, processes=2)          # starts the workers
            clock = time.perf_counter()
            render_faces(32, args.count // 8, size=size, seed=2, processes=2)
            out[f"{size}px two processes"] = round(32 * (args.count // 8) / (time.perf_counter() - clock))
    return out


def pixels(records) -> np.ndarray:
    return np.stack([records.pixels(i) for i in range(len(records))])


def found_by_scrfd(images: np.ndarray) -> float:
    import cv2
    from insightface.model_zoo.scrfd import SCRFD
    detector = SCRFD(str(find_model("det_500m.onnx")), session=session("det_500m.onnx"))
    detector.prepare(-1, input_size=(320, 320), det_thresh=0.5)
    pad = lambda x: cv2.copyMakeBorder(x, 104, 104, 104, 104, cv2.BORDER_CONSTANT, value=(127, 127, 127))[..., ::-1].copy()
    return float(np.mean([len(detector.detect(pad(x))[0]) > 0 for x in images]))


def arcface(images: np.ndarray) -> np.ndarray:
    net = session("w600k_mbf_dequant_fp32.onnx")
    x = ((images.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
    e = np.concatenate([net.run(None, {net.get_inputs()[0].name: x[i:i + 32]})[0] for i in range(0, len(x), 32)])
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def equal_error(e: np.ndarray, who: np.ndarray) -> dict:
    i, j = np.triu_indices(len(e), 1)
    score, same = (e @ e.T)[i, j], who[i] == who[j]
    genuine, impostor = np.sort(score[same]), np.sort(score[~same])
    t = np.unique(np.quantile(score, np.linspace(0, 1, 4000)))
    reject, accept = np.searchsorted(genuine, t) / len(genuine), 1 - np.searchsorted(impostor, t) / len(impostor)
    k = np.argmin(np.abs(reject - accept))
    return dict(eer=round(float(reject[k] + accept[k]) / 2, 4), genuine=round(float(genuine.mean()), 3), impostor=round(float(impostor.mean()), 3))


def age_and_gender(images: np.ndarray):
    net = session("genderage_mx.onnx")
    name = net.get_inputs()[0].name
    out = np.stack([net.run(None, {name: x.astype(np.float32).transpose(2, 0, 1)[None]})[0].ravel() for x in images])
    return out[:, 2:202].reshape(-1, 100, 2).argmax(2).sum(1), out[:, :2].argmax(1)


def expression(images: np.ndarray) -> np.ndarray:
    "As the package's adapter reads it: the crop was chosen on FER2013 and CK+, not on rendered faces."
    from hyperface.extraction.attributes import load_attribute_model
    return load_attribute_model("expression").predict(images.transpose(0, 3, 1, 2))["expression"].to_numpy(str)


def pose(images: np.ndarray) -> np.ndarray:
    import cv2
    nets = [session(f"fsanet-{k}-iter-688590.onnx") for k in ("1x1", "var")]
    prepare = lambda x: ((cv2.resize(cv2.copyMakeBorder(x, 10, 10, 10, 10, cv2.BORDER_REPLICATE)[..., ::-1], (64, 64)).astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None]
    return np.array([np.mean([n.run(None, {n.get_inputs()[0].name: prepare(x)})[0].ravel() for n in nets], 0) for x in images])


def models(args) -> dict:
    out = {}
    for nuisance in (0.0, 0.4, 1.0):
        r = render_faces(args.identities, 5, seed=args.seed, nuisance=nuisance, cache=False, ages=(8, 85))
        x, t = pixels(r), r.table
        age, male = age_and_gender(x)
        out[f"nuisance {nuisance}"] = dict(scrfd=found_by_scrfd(x), **equal_error(arcface(x), t["identity"].to_numpy()), age_r=round(float(np.corrcoef(age, t["age"])[0, 1]), 3),
                                           gender=round(float((male == (t["gender"] == "male")).mean()), 3))
        if nuisance == 1.0:
            out["FSA-Net r (yaw, pitch)"] = [round(abs(float(np.corrcoef(pose(x)[:, k], t[c])[0, 1])), 3) for k, c in enumerate(("yaw", "pitch"))]
    people = draw_identities(args.identities, args.seed + 1, ages=(18, 60))
    hits = {e: float((expression(render(people, make_conditions(len(people), e, seed=np.arange(len(people))), uint8=True)[0]) == e).mean()) for e in FER}
    assert set(FER) <= set(EXPRESSIONS)
    return out | {"expression": {k: round(v, 2) for k, v in hits.items()} | {"mean": round(float(np.mean(list(hits.values()))), 3)}}


def check(args) -> dict:
    r = render_faces(args.identities, 50, seed=17)
    marks = r.table[[f"lm{i}{a}" for i in range(5) for a in "xy"]].to_numpy().reshape(-1, 5, 2)
    found = {}
    for index, images in r.batches(256):
        for why, i in zip(broken(images, marks[index]), index):
            if why: found[int(i)] = str(why)
    return dict(pictures=len(r), broken=found)


def pair_accuracy(e: np.ndarray, table, hard: bool, seed: int = 0) -> float:
    g = np.random.default_rng(seed)
    who = table["identity"].to_numpy()
    group = (table["gender"].astype(str) + table["ethnicity"].astype(str)).to_numpy() if hard else np.zeros(len(who))
    pairs, label = [], []
    for i in range(len(who)):
        same = np.flatnonzero((who == who[i]) & (np.arange(len(who)) != i))
        other = np.flatnonzero((who != who[i]) & (group == group[i]))
        if len(same) and len(other):
            pairs += [(i, g.choice(same)), (i, g.choice(other))]
            label += [1, 0]
    pairs, label = np.array(pairs), np.array(label)
    score = (e[pairs[:, 0]] * e[pairs[:, 1]]).sum(1)
    half = (who[pairs[:, 0]] % 2).astype(bool)                        # threshold from one half of the people, accuracy on the other
    best = lambda m: max(np.quantile(score[m], np.linspace(.01, .99, 99)), key=lambda t: ((score[m] >= t) == label[m]).mean())
    return round(float(np.mean([((score[~m] >= best(m)) == label[~m]).mean() for m in (half, ~half)])), 4)


def lfw_development(embed, size: int) -> dict | None:
    "Accuracy on LFW's development pairs (pairsDevTrain: 1,100 genuine, 1,100 impostor), ten folds, threshold from the other nine."
    from hyperface.core import data_dir
    from hyperface.data.formats import read_dataset
    from hyperface.data.images import fit_image
    from hyperface.data.pairs import read_pairs
    from hyperface.metrics.verification import kfold_accuracy
    root = data_dir("lfw")
    if root is None: return None
    pairs = read_pairs(root / "pairsDevTrain.txt", read_dataset(root / "lfw112")).compact()
    images = np.stack([fit_image(pairs.records.pixels(i), size) for i in range(len(pairs.records))])
    accuracy = lambda e: round(float(kfold_accuracy(pairs.scores(e), pairs.labels, np.arange(len(pairs)) % 10)), 4)
    return dict(pairs=len(pairs), **{name: accuracy(f(images)) for name, f in (("network", embed), ("mean colour", mean_colour), ("16x16 pixels", tiny_pixels))})


def directions(e: np.ndarray) -> np.ndarray:
    "Unit vectors from the mean."
    e = e - e.mean(0)
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def held(fixed: list) -> dict:
    "Conditions held at one value, from words such as yaw=0 and expression=neutral."
    number = lambda x: float(x) if x.replace(".", "", 1).lstrip("-").isdigit() else x
    return {k: number(v) for k, v in (word.split("=", 1) for word in fixed)}


def mean_colour(x: np.ndarray) -> np.ndarray:
    return directions(x.astype(np.float32).mean((1, 2)))


def tiny_pixels(x: np.ndarray) -> np.ndarray:
    return directions(x.astype(np.float32).reshape(len(x), 16, x.shape[1] // 16, 16, x.shape[2] // 16, 3).mean((2, 4)).reshape(len(x), -1))


def task(args) -> dict:
    from dataclasses import replace

    import torch
    import torch.nn.functional as F

    from hyperface.recognition.backbones import create_model
    from hyperface.recognition.margins import ArcFace, MarginHead
    from hyperface.recognition.train import NO_AUGMENT, AugmentConfig, augment
    torch.manual_seed(args.train_seed)
    train, test = render_faces(args.identities, args.per, size=args.size, seed=5, nuisance=args.nuisance, **held(args.fixed)), render_faces(200, 10, size=args.size, seed=6)
    changes = AugmentConfig(grey=.2, low=.25) if args.vary else replace(NO_AUGMENT, flip=.5)
    x, y = pixels(train), torch.as_tensor(train.table["identity"].to_numpy().copy())
    net, head = create_model("resnet_tiny", embedding_dim=128, image_size=args.size), MarginHead(128, args.identities, ArcFace(s=24, m=.2))
    net = net.to(memory_format=torch.channels_last)                   # a fifth faster on CPUs
    batch, start, cpu = 128, time.monotonic(), time.process_time()
    spent = (lambda: steps/args.steps) if args.steps else (lambda: (time.monotonic() - start)/args.seconds)
    optimiser = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = 0
    while spent() < 1:
        for k in torch.randperm(len(x)).split(batch):
            done = spent()
            if done >= 1: break
            for group in optimiser.param_groups: group["lr"] = 0.1 * (0.5 + 0.5 * np.cos(np.pi * done)) * min(1, steps / 100 + 0.05)
            loss = head.loss(net(augment(x[k.numpy()], k.numpy(), steps, args.train_seed, changes).contiguous(memory_format=torch.channels_last)), y[k])
            optimiser.zero_grad(); loss.backward(); optimiser.step(); steps += 1
    out = dict(steps=steps, seconds=round(time.monotonic() - start), cpu_seconds=round(time.process_time() - cpu), loss=round(float(loss.detach()), 3))
    net.eval()
    def embed(images):
        q = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad(): return torch.cat([F.normalize(net(b) + net(b.flip(-1))) for b in q.split(256)]).numpy()
    images = pixels(test)
    for name, v in (("network", embed(images)), ("mean colour", mean_colour(images)), ("16x16 pixels", tiny_pixels(images))): out[name] = dict(any=pair_accuracy(v, test.table, False), same_sex_and_group=pair_accuracy(v, test.table, True))
    if lfw := lfw_development(embed, args.size): out["LFW development pairs"] = lfw
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "models", "broken", "task"])
    parser.add_argument("--identities", type=int, default=None, help="people (models 100, broken 200, task 1000)")
    parser.add_argument("--count", type=int, default=512, help="pictures for the measurement of speed")
    parser.add_argument("--seconds", type=float, default=300, help="seconds of training")
    parser.add_argument("--steps", type=int, default=0, help="steps of 128 pictures instead of seconds, to compare trainings at one budget on a busy machine (task)")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side, a multiple of 16 (task)")
    parser.add_argument("--per", type=int, default=30, help="pictures of each person trained on (task)")
    parser.add_argument("--fixed", nargs="*", default=[], help="conditions held while the people trained on are drawn, such as yaw=0 pitch=0 (task)")
    parser.add_argument("--train-seed", type=int, default=0, help="of the network's weights and the order of pictures (task)")
    parser.add_argument("--nuisance", type=float, default=1.0, help="of the people trained on (task)")
    parser.add_argument("--vary", action="store_true", help="vary the training pictures as the trainer does: shift, colour, grey, resolution (task); without it only mirrored")
    parser.add_argument("--seed", type=int, default=2026, help="of the people shown to the models; seeds 3 and 11 served in tuning the renderer")
    args = parser.parse_args()
    args.identities = args.identities or dict(models=100, broken=200, task=1000).get(args.what, 0)
    print(json.dumps(dict(speed=speed, models=models, broken=check, task=task)[args.what](args), indent=1))

"""What a GPU does of the work that `hyperface plan` counts, and what half the bits bring. Needs a CUDA device.

    python bench/gpu.py [--seconds 3] [--parts rates,precision,vec2face,packing,heads] [--out gpu_rates.json]

rates: seconds a unit of the work of `full`, by the probes of `hyperface plan --measure`, images read and augmented by the processor beside
the training. With --out everything is written as the package ships it (hyperface/assets/gpu_rates.json), where plan and pages read it.
precision: a training step of iresnet50 at 112 px, batch 128, prepared batches: bf16 and fp16 against float32 with and without TF32, in turns.
vec2face: the published sizes: images a second and peak memory. packing: a step at a hundred thousand and at a million points in 512
dimensions. heads: a million classes, a tenth of the centres a step.
"""
import argparse
import json
import os
import statistics
import time
import warnings

os.environ.setdefault("HYPERFACE_PROGRESS", "0")
import numpy as np
import torch

from hyperface.config import load_profile
from hyperface.core import cpu_count, git_commit, write_json
from hyperface.data.records import Records
from hyperface.recognition.train import RecognitionTrainer, recipe
from hyperface.report.plan import GPU_PROBES, WORK, Work, measure, operations

MORE = [("recogniser", 112, "insightface"), ("gan", 64, "auto 64"), ("gan", 256, "paper256 256")]


def rates(seconds: float) -> dict:
    units = {w.unit: None for p in ("full", "study") for f in WORK.values() for w in f(load_profile(p)) if w.kind in GPU_PROBES and w.amount}
    for unit in [*units, *MORE]:
        units[unit] = measure(unit, seconds, "cuda")
        reached = operations(*unit) / units[unit] / 1e12
        print(f"{1 / units[unit]:12,.1f} a second, {reached:6.1f} TFLOPS  {Work(unit[0], 1, *unit[1:])}", flush=True)
        torch.cuda.empty_cache()
    return units


def precision(turns: int = 4, steps: int = 10, batch: int = 128) -> dict:
    g = np.random.default_rng(0)
    noise = Records.from_arrays(g.integers(0, 255, (batch, 112, 112, 3), dtype=np.uint8), name="noise", identity=np.arange(batch))
    ways = {name: RecognitionTrainer(recipe("insightface", batch=batch, epochs=10**4, precision=name.split()[0]), noise, n_classes=10_000, device="cuda") for name in ("float32", "float32 TF32", "bf16", "fp16")}
    ready, seen = ways["bf16"].batch(0), {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, t in ways.items():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "TF32" in name
            torch.cuda.synchronize(); began = time.perf_counter()
            for k in range(steps): t.train_step(turn * steps + k, *ready)
            torch.cuda.synchronize()
            if turn: seen[name].append(steps * batch / (time.perf_counter() - began))
    torch.backends.cudnn.allow_tf32 = True
    found = {name: statistics.median(v) for name, v in seen.items()}
    for name, v in found.items(): print(f"iresnet50 112 px batch {batch} {name:13} {v:8,.0f} images/s, {v / found['float32']:.2f} x float32", flush=True)
    return found


def vec2face(batches=(32, 128), steps: int = 6) -> dict:
    from hyperface.extraction.onnx_torch import TorchEmbedder, UnitNetwork
    from hyperface.recognition.backbones import create_model
    from hyperface.vec2face.train import Vec2FaceTrainer, vec2face_config
    g, found = np.random.default_rng(0), {}
    for batch in batches:
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        c = vec2face_config("vec2face", batch=batch, epochs=1000.)
        noise = Records.from_arrays(g.integers(0, 255, (200, 112, 112, 3), dtype=np.uint8), name="noise", identity=np.arange(200) // 4)
        teacher = TorchEmbedder(UnitNetwork(create_model("iresnet50", image_size=112), 112), "untrained", "cuda")
        try:
            t = Vec2FaceTrainer(c, noise, teacher, device="cuda")
            for critic in (False, True):
                first = t.total - 1 - steps if critic else 0
                t.step(first); torch.cuda.synchronize(); began = time.perf_counter()
                for k in range(1, steps): t.step(first + k)
                torch.cuda.synchronize()
                key = f"batch {batch}" + (" with critic" if critic else "")
                found[key] = dict(images_per_s=(steps - 1) * batch / (time.perf_counter() - began), peak_gb=torch.cuda.max_memory_allocated() / 1e9)
                print(f"vec2face {key}: {found[key]['images_per_s']:.1f} images/s, peak {found[key]['peak_gb']:.1f} GB", flush=True)
            del t
        except (RuntimeError, torch.OutOfMemoryError) as e:
            found[f"batch {batch}"] = dict(error=str(e)[:200]); print(f"vec2face batch {batch}: {str(e)[:200]}", flush=True)
    return found


def packing(sizes=(100_000, 1_000_000)) -> dict:
    from hyperface.sphere.packing import Hinge
    found = {}
    for n in sizes:
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        x = torch.nn.functional.normalize(torch.randn(n, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0)))
        h = Hinge(x, 100, low=True, block=8192, seed=0); del x
        spent = []
        for _ in range(3 if n < 500_000 else 2):
            torch.cuda.synchronize(); began = time.perf_counter()
            h.step()
            torch.cuda.synchronize(); spent.append(time.perf_counter() - began)
        found[str(n)] = dict(seconds=spent[1:], first=spent[0], peak_gb=torch.cuda.max_memory_allocated() / 1e9)
        print(f"packing {n:,} x 512: first step {spent[0]:.2f} s, then {statistics.median(spent[1:]):.2f} s, peak {found[str(n)]['peak_gb']:.1f} GB", flush=True)
        del h
    return found


def heads(classes: int = 1_000_000, batch: int = 128, steps: int = 20) -> dict:
    from hyperface.recognition.margins import MarginHead, RowSGD, make_margin
    found = {}
    for share in (.1, 1.):
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        head = MarginHead(512, classes, make_margin("arcface"), sample_rate=share, seed=0).cuda()
        opt = (torch.optim.SGD if share == 1 else RowSGD)(head.parameters(), lr=.1, momentum=.9, weight_decay=5e-4)
        x, spent = torch.randn(batch, 512, device="cuda").requires_grad_(), []
        for k in range(steps):
            torch.cuda.synchronize(); began = time.perf_counter()
            opt.zero_grad(set_to_none=True); head.loss(x, torch.randint(classes, (batch,), device="cuda")).backward(); opt.step()
            torch.cuda.synchronize(); spent.append(time.perf_counter() - began)
        found[str(share)] = dict(ms=1e3 * statistics.median(spent[3:]), peak_gb=torch.cuda.max_memory_allocated() / 1e9)
        print(f"head of {classes:,} classes, {share:.0%} of the centres: {found[str(share)]['ms']:.1f} ms a step of {batch}, peak {found[str(share)]['peak_gb']:.1f} GB", flush=True)
        del head, opt
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.)
    parser.add_argument("--parts", default="rates,precision,vec2face,packing,heads")
    parser.add_argument("--out", default=None, help="file for all of it, as shipped")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available(): raise SystemExit("No CUDA device on this machine")
    about = dict(gpu=torch.cuda.get_device_name(), processors=cpu_count(), torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), commit=git_commit())
    print(json.dumps(about), flush=True)
    parts = args.parts.split(","); more = {}
    found = rates(args.seconds) if "rates" in parts else {}
    for name, part in dict(precision=precision, vec2face=vec2face, packing=packing, heads=heads).items():
        if name not in parts: continue
        try: more[name] = part()
        except Exception as e: print(f"{name}: {type(e).__name__}: {str(e)[:300]}", flush=True); more[name] = dict(error=str(e)[:300])
    if args.out: write_json(args.out, about | dict(rates=[[*unit, seconds] for unit, seconds in found.items()], more=more))
    print(json.dumps(more))


if __name__ == "__main__":
    main()

"""What a margin costs: a step with `MarginHead` beside a step with `nn.Linear` and cross-entropy, and sampled centres at a million classes.

    python bench/heads.py                            both parts, as JSON
    python bench/heads.py overhead --classes 10000 --dim 512 --batch 128 --rounds 8
    python bench/heads.py sampled --classes 1000000 --rates .01,.02,.05,.1
    python bench/heads.py growth                     the same number of kept centres among 100 thousand to a million classes

A step is forward, backward and optimiser. The two sides of a comparison take turns within one process, so that they meet the same
load; ratios are medians over rounds, of processor time and of wall time, and that of the least processor times, which a busy machine
stretches least. Peak memory is that of a process of its own.
Targets of issue 4: overhead <= 15 % at 10k classes x 512, batch 128; 1M classes x 512 in training within 6 GB.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def small_backbone(dim: int):
    "Some seven million multiplications a pixel column: a light stand-in, so that the head is not hidden behind it."
    from torch import nn
    layers, width = [], 3
    for out in (32, 64, 128, 128):
        layers += [nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.PReLU(out)]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 7 * 7, dim))


def backbone(name: str, dim: int):
    if name == "small":
        return small_backbone(dim)
    from hyperface.recognition.backbones import create_model
    return create_model(name)


def stepper(net, head, loss, optimiser, batch: int, dim: int, classes: int, seed: int):
    "A function that takes one training step and says what it cost: wall and processor seconds."
    import torch
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 112, 112, generator=g) if net is not None else None
    features = torch.randn(batch, dim, generator=g).requires_grad_()
    opts = [optimiser(head.parameters())] + ([torch.optim.SGD(net.parameters(), .1, momentum=.9, weight_decay=5e-4)] if net is not None else [])

    def step():
        labels = torch.randint(classes, (batch,), generator=g)
        start = time.perf_counter(), time.process_time()
        for o in opts:
            o.zero_grad(set_to_none=True)
        features.grad = None
        loss(features if net is None else net(images), labels).backward()
        for o in opts:
            o.step()
        return time.perf_counter() - start[0], time.process_time() - start[1]
    return step


def compare(steps: dict, rounds: int, base: str) -> dict:
    "Take turns; per name the median seconds and the median ratio to `base`, round by round."
    times = {name: [] for name in steps}
    for r in range(rounds + 1):
        for name in (list(steps) if r % 2 else list(steps)[::-1]):
            cost = steps[name]()
            if r:                                                           # the first round warms up
                times[name].append(cost)
    median = lambda values: round(statistics.median(values), 5)
    least = {name: min(t[1] for t in rows) for name, rows in times.items()}
    return {name: dict(wall_s=median(t[0] for t in rows), cpu_s=median(t[1] for t in rows), least_cpu_s=round(least[name], 5), wall_ratio=median(a[0] / b[0] for a, b in zip(rows, times[base])),
                       cpu_ratio=median(a[1] / b[1] for a, b in zip(rows, times[base])), least_cpu_ratio=round(least[name] / least[base], 5)) for name, rows in times.items()}


def overhead(a) -> dict:
    import copy

    import torch
    import torch.nn.functional as F

    from hyperface.core import set_threads
    from hyperface.recognition.margins import MarginHead, RowSGD
    set_threads(a.threads)
    sgd = lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=5e-4)
    rows = lambda p: RowSGD(p, .1, momentum=.9, weight_decay=5e-4)
    net, margins = backbone(a.backbone, a.dim), a.margins.split(",")

    def sides(net, margins):
        made = {}
        linear = torch.nn.Linear(a.dim, a.classes)
        make = lambda: None if net is None else copy.deepcopy(net)
        made["linear"] = stepper(make(), linear, lambda x, y: F.cross_entropy(linear(x), y), sgd, a.batch, a.dim, a.classes, 0)
        for margin in margins:
            head = MarginHead(a.dim, a.classes, margin)
            made[margin] = stepper(make(), head, head.loss, sgd, a.batch, a.dim, a.classes, 0)
        first = margins[0]
        head_rows, head_logits = MarginHead(a.dim, a.classes, first), MarginHead(a.dim, a.classes, first)
        made[f"{first}, RowSGD"] = stepper(make(), head_rows, head_rows.loss, rows, a.batch, a.dim, a.classes, 0)
        made[f"{first}, logits + cross_entropy"] = stepper(make(), head_logits, lambda x, y: F.cross_entropy(head_logits(x, y), y), sgd, a.batch, a.dim, a.classes, 0)
        return made

    out = dict(classes=a.classes, dim=a.dim, batch=a.batch, threads=a.threads, load=os.getloadavg()[0], backbone=a.backbone)
    out["with_backbone"] = compare(sides(net, margins[:1]), 2 * a.rounds, "linear")
    out["head_alone"] = compare(sides(None, margins), 4 * a.rounds, "linear")
    return out | dict(load_after=os.getloadavg()[0])


def worker(a) -> dict:
    "One sampled head in a process of its own."
    import resource

    import torch

    from hyperface.core import set_threads
    from hyperface.recognition.margins import MarginHead, RowSGD
    set_threads(a.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = float(a.rates)
    head = MarginHead(a.dim, a.classes, a.margins.split(",")[0], sample_rate=rate)
    opt = RowSGD(head.parameters(), .1, momentum=.9, weight_decay=5e-4)
    opt.state[head.weight]["momentum_buffer"] = torch.zeros_like(head.weight).fill_(0.)     # every row touched, as after an epoch: the honest peak
    step = stepper(None, head, head.loss, lambda p: opt, a.batch, a.dim, a.classes, 0)
    costs = [step() for _ in range(a.rounds + 1)][1:]
    kept = head.sample(torch.arange(a.batch))[0].numel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(classes=a.classes, rate=rate, centres=kept, wall_s=round(statistics.median(c[0] for c in costs), 4), cpu_s=round(statistics.median(c[1] for c in costs), 4),
                peak_gb=round(peak * 2**30 / 1e9, 3), peak_gib=round(peak, 3), start_gib=round(before, 3))


def spawn(a, classes: int, rate: float) -> dict:
    command = [sys.executable, __file__, "worker", f"--classes={classes}", f"--rates={rate!r}", f"--dim={a.dim}", f"--batch={a.batch}", f"--rounds={a.rounds}", f"--threads={a.threads}", f"--margins={a.margins}"]
    done = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS=str(a.threads)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{classes:,} classes at {rate} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=["all", "overhead", "sampled", "growth", "worker"])
    parser.add_argument("--classes", type=int, help="10,000 for the overhead, 1,000,000 sampled")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rates", default=".01,.02,.05,.1", help="sample rates, comma-separated")
    parser.add_argument("--margins", default="arcface,cosface,sphereface,adaface")
    parser.add_argument("--backbone", default="small", help="small, or a name that create_model knows")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("HYPERFACE_THREADS", 1)))
    parser.add_argument("--json", help="write the result here too")
    a = parser.parse_args()
    if a.part == "worker":
        print(json.dumps(worker(a)))
        return
    out = {}
    if a.part in ("all", "overhead"):
        out["overhead"] = overhead(argparse.Namespace(**vars(a) | dict(classes=a.classes or 10_000)))
    if a.part in ("all", "sampled"):
        out["sampled"] = [spawn(a, a.classes or 1_000_000, float(rate)) for rate in a.rates.split(",")]
    if a.part in ("all", "growth"):
        out["growth"] = [spawn(a, classes, 20_000 / classes) for classes in (100_000, 300_000, 1_000_000)]
    print(json.dumps(out, indent=1))
    if a.json:
        from hyperface.core import write_json
        write_json(a.json, out)


if __name__ == "__main__":
    main()

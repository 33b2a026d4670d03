"""Speed and memory of StyleGAN2 against its plain layers, in one run.

    python bench/stylegan2.py [--resolution 64] [--channel-base 1024] [--channel-max 128] [--batch 16] [--repeats 5] [--threads 0]

Targets: generator >= 1.5 x, full training step (both networks, R1 and path length at their intervals) >= 1.3 x. Exit status 1 if one is missed.
"""
import argparse
import copy
import sys
import time

import torch
from plain_stylegan2 import plain
from torch.profiler import ProfilerActivity, profile

from hyperface.core import set_threads
from hyperface.stylegan2.losses import PathLength, d_loss, g_loss, r1_penalty
from hyperface.stylegan2.train import build_networks, gan_config


def generator_pass(G, D, z, c, x):
    with torch.no_grad():
        G.eval()(z, c)


def training_step(G, D, z, c, x, extra=()):
    "Both networks once, and the regularisers that are named."
    G.train(), D.train()
    for p in [*G.parameters(), *D.parameters()]:
        p.grad = None
    D.requires_grad_(False), G.requires_grad_(True)
    g_loss(D(G(z, c), c)).backward()
    if "pl" in extra:
        half = len(z) // 2
        ws = G.mapping(z[:half], c[:half])
        (4 * PathLength()(G.synthesis(ws), ws)[0]).backward()
    D.requires_grad_(True), G.requires_grad_(False)
    with torch.no_grad():
        fake = G(z, c)
    d_loss(D(x, c), D(fake, c)).backward()
    if "r1" in extra:
        real = x.clone().requires_grad_()
        (16 * r1_penalty(D(real, c), real, 0.1)).backward()


def clock(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_memory(run):
    "Largest sum of tensors allocated in a pass, in MB."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    live = top = 0
    for event in sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("resolution", 64), ("channel-base", 1024), ("channel-max", 128), ("batch", 16), ("repeats", 5), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    threads = set_threads(args.threads or None)
    torch.manual_seed(0)
    config = gan_config("cpu64", args.resolution, conditions=("age",), channel_base=args.channel_base, channel_max=args.channel_max, batch=args.batch)
    G, D = build_networks(config, 16)
    ours = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in (G, D)]
    data = torch.randn(args.batch, config.z_dim), torch.randn(args.batch, 16), torch.randn(args.batch, 3, args.resolution, args.resolution)
    with torch.no_grad():
        with plain():
            wanted = G.eval()(*data[:2], noise_mode="const")
        error = float((ours[0].eval()(*data[:2], noise_mode="const") - wanted).abs().max() / wanted.abs().max())
    print(f"{args.resolution} px, channel_base {args.channel_base}, channel_max {args.channel_max}, batch {args.batch}, {threads} threads; largest relative difference of the pictures {error:.1e}")

    def measure(run):
        run(*ours, *data)
        with plain():
            run(G, D, *data)
        found = {"ours": [], "plain": []}
        for _ in range(args.repeats):  # by turns, so that a busy minute hits both
            found["ours"].append(clock(lambda: run(*ours, *data)))
            with plain():
                found["plain"].append(clock(lambda: run(G, D, *data)))
        return min(found["ours"]), min(found["plain"])

    gen = measure(generator_pass)
    bare, pl, r1 = [measure(lambda *a, extra=extra: training_step(*a, extra)) for extra in ((), ("pl",), ("r1",))]
    # as the published schedule has it: path length every 4th step, R1 every 16th
    step = [m + (p - m) / 4 + (r - m) / 16 for m, p, r in zip(bare, pl, r1)]
    ratios = {}
    for name, (mine, theirs), target in (("generator", gen, 1.5), ("training step", step, 1.3)):
        ratios[name] = theirs / mine
        print(f"{name:14} ours {1e3*mine:7.1f} ms ({args.batch/mine:6.1f} images/s), plain {1e3*theirs:7.1f} ms ({args.batch/theirs:6.1f} images/s): {theirs/mine:.2f} x (target {target} x)")
    for name, run in (("generator", generator_pass), ("training step", lambda *a: training_step(*a, ("pl", "r1")))):
        mine = peak_memory(lambda: run(*ours, *data))
        with plain():
            theirs = peak_memory(lambda: run(G, D, *data))
        print(f"{name:14} peak of tensors: ours {mine:.0f} MB, plain {theirs:.0f} MB")
    return int(ratios["generator"] < 1.5 or ratios["training step"] < 1.3)


if __name__ == "__main__":
    sys.exit(main())

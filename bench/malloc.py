"""Processor time of one training with glibc's habits and with those that `hyperface reproduce` sets: what keeping freed memory saves.

    python bench/malloc.py [--rounds 3]
"""
import argparse
import os
import resource
import subprocess
import sys

from hyperface.pipeline import MALLOC

CODE = """
import resource, torch
torch.set_num_threads(1)
from hyperface.data.rendered import render_faces
from hyperface.recognition.train import RecognitionTrainer, recipe
people = render_faces(24, 16, size=40, seed=3)
before = resource.getrusage(resource.RUSAGE_SELF)
RecognitionTrainer(recipe("cpu_quick", epochs=4, validate_every=0.), people).fit()
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, after.ru_maxrss/1e6)
"""


def once(environment: dict) -> tuple[float, float, float]:
    "User and system seconds of a training, and the peak of memory in GB."
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()[-3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    plain = {k: v for k, v in os.environ.items() if k not in MALLOC} | dict(OMP_NUM_THREADS="1", HYPERFACE_PROGRESS="0")
    found = {name: [] for name in ("glibc", "kept")}
    once(plain)                                                        # the people are rendered and cached
    for _ in range(rounds):
        for name, environment in (("glibc", plain), ("kept", plain | MALLOC)):
            found[name].append(once(environment))
    best = {name: min(runs, key=lambda r: r[0] + r[1]) for name, runs in found.items()}
    for name, (user, system, peak) in best.items():
        print(f"{name:6s} {user:6.1f} s user {system:6.1f} s system  peak {peak:.2f} GB")
    print(f"ratio of processor time, kept to glibc: {sum(best['kept'][:2])/sum(best['glibc'][:2]):.3f} (best of {rounds}; {resource.getpagesize()} bytes a page)")


if __name__ == "__main__":
    main()

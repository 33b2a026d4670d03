"""How often `hyperface compare` flags runs that differ by their seed alone, and the training spread that it allows for.

    python bench/seeds.py RUN RUN RUN [RUN ...]           reports of one profile, each with a seed of its own
    python bench/seeds.py RUN RUN RUN [RUN ...] --write   and keep the spread in hyperface/assets/training_spread.csv

A pair of runs is judged with the spread of the *other* runs, so that nothing is tested on what it was fitted to.
"""
from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import pandas as pd

from hyperface.core import write_text
from hyperface.report.compare import compare, read_results, training_spread

ASSET = Path(__file__).resolve().parents[1] / "hyperface" / "assets" / "training_spread.csv"


def shares(runs: list[str]) -> pd.DataFrame:
    "For each pair: values with intervals that are not equal, and the share beyond, with and without the spread of the others."
    rows = []
    for a, b in combinations(runs, 2):
        others = [r for r in runs if r not in (a, b)]
        found = compare(a, b, training_spread(others) if len(others) > 1 else False)
        moving = found.counts["beyond"] + found.counts["within"]
        rows.append({"A": a, "B": b, "values": moving, "beyond intervals, %": 100 * found.on_intervals_alone / moving, "beyond with the spread of the others, %": 100 * found.counts["beyond"] / moving if len(others) > 1 else None})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    table = shares(args.runs)
    print(table.round(1).to_string(index=False))
    print(table.drop(columns=["A", "B"]).mean().round(1).to_string())
    if args.write:
        spread = training_spread(args.runs)
        commits = " ".join(sorted({str(c) for r in args.runs for c in read_results(r)["commit"].dropna()}))
        spread = spread[spread["spread"] > 0].assign(commit=commits).round({"spread": 4})
        kept = pd.read_csv(ASSET) if ASSET.exists() else spread.iloc[:0]
        write_text(ASSET, pd.concat([kept[kept["profile"] != spread["profile"].iloc[0]], spread]).to_csv(index=False))
        print(f"-> {ASSET}: {len(spread)} columns")

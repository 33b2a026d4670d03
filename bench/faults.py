"""The pipeline under faults: SIGKILL in every step, a full disk, a damaged cache. The next run must end with the tables of an undisturbed one.

    python bench/faults.py [--profile smoke] [--only t1 e5] [--keep FOLDER] [--faults kill cache disk]

kill: for each step the report of an undisturbed run is copied, the step is made stale, killed after a random share of its own time, and run again.
cache: every file of a private cache is cut in half, and everything runs again. disk: a report on a full file system (mounts one: root, Linux).
"""
import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(out: Path, profile: str, only: list[str] | None = None, kill_after: float | None = None) -> tuple[int, str]:
    "Exit code and text of `hyperface reproduce`; with `kill_after` the whole process group is killed after so many seconds."
    command = [sys.executable, "-m", "hyperface.cli", "reproduce", "--profile", profile, "--out", str(out), *(["--only", *only] if only else [])]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    if kill_after is None:
        text, _ = p.communicate()
        return p.returncode, text
    try:
        text, _ = p.communicate(timeout=kill_after)
        return p.returncode, text                                       # it was faster than the kill
    except subprocess.TimeoutExpired:
        children = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()
        for pid in children:                                            # kernels sit in sessions of their own
            try: os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError: pass
        os.killpg(p.pid, signal.SIGKILL)
        p.communicate()
        return -9, ""


def tables(out: Path) -> dict[str, Path]:
    return {f.name: f for f in sorted((out / "tables").glob("*.csv"))}


TIMES = ("second", " ms", "processor time")


def untimed(f: Path) -> list[str]:
    "The lines of a table that time nothing; none where a column does."
    head, *rows = f.read_text(encoding="utf-8").splitlines()
    return [] if any(w in head for w in TIMES) else [head, *(r for r in rows if not any(w in r for w in TIMES))]


def differing(a: Path, b: Path) -> list[str]:
    "Tables that are missing in b or not equal byte for byte. Measured times differ by nature and are left out."
    x, y = tables(a), tables(b)
    return [n for n, f in x.items() if n not in y or not (filecmp.cmp(f, y[n], shallow=False) or untimed(f) == untimed(y[n]))]


def kill(name: str, calm: Path, work: Path, profile: str, draw, only: list[str] | None) -> bool:
    told = json.loads((calm / "steps" / f"{name}.json").read_text())
    out = work / "disturbed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(calm, out)
    (out / "steps" / f"{name}.json").unlink()
    after = 3 + draw.random()*told["seconds"]
    killed, _ = run(out, profile, [name], kill_after=after)
    return judge(f"{name}: {'killed' if killed == -9 else 'had ended'} after {after:.1f} s", calm, out, profile, only)


def judge(what: str, calm: Path, out: Path, profile: str, only: list[str] | None, compare: bool = True) -> bool:
    "Run again: right exit code, the same tables, nothing half-written?"
    started = time.time()
    code, text = run(out, profile, only)
    wrong = differing(calm, out) if compare else []
    ok = code == 0 and not wrong and not list(out.rglob("*.part")) and not list(out.rglob(".*running*"))
    print(f"{'ok ' if ok else 'BAD'} {what}; next run {time.time() - started:.0f} s, exit {code}{', tables differ: ' + ', '.join(wrong) if wrong else ''}", flush=True)
    if not ok: print(text[-1500:])
    return ok


def cut_cache(calm: Path, work: Path, profile: str, only: list[str] | None) -> bool:
    files = [f for f in (work / "runs").rglob("*") if f.is_file() and f.stat().st_size > 1]
    for f in files: os.truncate(f, f.stat().st_size//2)
    return judge(f"{len(files)} files of the cache cut in half", calm, work / "cut", profile, only)


def full_disk(calm: Path, work: Path, profile: str) -> bool:
    place = work / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]).returncode:
        print("skipped: no file system could be mounted")
        return True
    try:
        code, text = run(place / "report", profile, ["t3"])
        told = code not in (0, -9) and "No space left" in text
        print(f"{'ok ' if told else 'BAD'} full disk: exit {code}, {text.strip().splitlines()[-1][:160]}")
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
        return judge("the same with space", calm, place / "report", profile, ["t3"], compare=False) and told
    finally: subprocess.run(["umount", str(place)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--profile", default="smoke")
    p.add_argument("--only", nargs="*", help="steps to run and disturb; default: all")
    p.add_argument("--faults", nargs="+", default=["kill", "cache", "disk"], choices=["kill", "cache", "disk"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep", type=Path, help="folder of the undisturbed run, kept and used again")
    args = p.parse_args()
    from hyperface.pipeline import choose, find_steps
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="hyperface-faults-"))
    if "cache" in args.faults: os.environ["HYPERFACE_RUNS"] = str(work / "runs")
    calm = args.keep or work / "calm"
    code, text = run(calm, args.profile, args.only)
    assert code == 0, text[-3000:]
    found = []
    if "kill" in args.faults: found += [kill(name, calm, work, args.profile, draw, args.only) for name in choose(find_steps(), args.only)[1]]
    if "cache" in args.faults: found.append(cut_cache(calm, work, args.profile, args.only))
    if "disk" in args.faults: found.append(full_disk(calm, work, args.profile))
    print(f"{sum(found)} of {len(found)} faults end right")
    shutil.rmtree(work, ignore_errors=True)
    sys.exit(not all(found))


if __name__ == "__main__":
    main()

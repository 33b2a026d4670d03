"""A newcomer has neither photographs nor models: the pages that would read them end well all the same, and say so."""
import json
import os
import subprocess
import sys


def test_pages_that_read_photographs_run_without_any(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("HYPERFACE_DATA", "HYPERFACE_MODELS")}
    done = subprocess.run([sys.executable, "-m", "hyperface.cli", "reproduce", "--profile", "smoke", "--only", "e4", "r1", "r2", "r3", "t3", "--out", str(tmp_path)],
                          capture_output=True, text=True, timeout=1200, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["failed"] == [] and not any(told["data"].values())
    assert (tmp_path / "tables" / "r2_attribute_gaps.csv").exists()

"""The whole paper at the `smoke` profile: every notebook, every table, and what each leaves behind."""
import json
import resource
import subprocess
import sys

import pandas as pd
import pytest

from hyperface.pipeline import find_steps
from hyperface.report.results import read_records

pytestmark = pytest.mark.xdist_group("smoke")


def test_every_step_ends_well_and_leaves_what_it_says(smoke_report):
    summary = json.loads((smoke_report / "run.json").read_text())
    assert summary["failed"] == [] and set(summary["steps"]) == set(find_steps())
    for step in summary["steps"].values():
        assert step["status"] == "done" and step["seconds"] > 0
    assert summary["provenance"]["versions"]["torch"] != "not installed" and summary["sizes"]["name"] == "smoke"


def test_every_table_has_three_formats_a_verdict_and_an_origin(smoke_report):
    records = read_records(smoke_report)
    tables = [r for r in records if r["kind"] == "table"]
    assert {"table1", "table3"} <= {r["name"] for r in tables}
    for r in tables:
        assert [f.rsplit(".", 1)[1] for f in r["files"]] == ["csv", "md", "tex"]
        assert all((smoke_report / f).stat().st_size for f in r["files"])
        assert r["status"] == "computed" or r["why"]
        assert r["parameters"]["profile"] == "smoke" and r["provenance"]["versions"]["numpy"]
        assert len(pd.read_csv(smoke_report / r["files"][0]))


def test_every_chart_has_its_numbers(smoke_report):
    figures = [r for r in read_records(smoke_report) if r["kind"] == "figure"]
    assert figures
    for r in figures:
        assert r["alt"] and (smoke_report / r["files"][0]).stat().st_size > 1000
        if r["files"][0].endswith(".png"):
            assert len(pd.read_csv(smoke_report / r["files"][1]))


def test_no_picture_is_blank(smoke_report):
    import numpy as np
    from PIL import Image
    for r in read_records(smoke_report):
        if r["kind"] == "figure":
            pixels = np.asarray(Image.open(smoke_report / r["files"][0]).convert("L"), dtype=float)
            assert pixels.std() > 5, r["name"]


def test_a_second_run_has_nothing_to_do(smoke_report):
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])      # processor time: how busy the machine is does not count
    before = spent()
    done = subprocess.run([sys.executable, "-m", "hyperface.cli", "reproduce", "--profile", "smoke", "--out", str(smoke_report)], capture_output=True, text=True)
    assert done.returncode == 0 and "up to date" in done.stdout, done.stdout
    assert spent() - before < 15


def test_results_in_long_form(smoke_report):
    frame = pd.read_parquet(smoke_report / "results.parquet")
    assert len(frame) > 20 and frame.value.notna().all() and set(frame.profile) == {"smoke"}


def test_table1_alone_with_plain_papermill(tmp_path, root):
    "`papermill nbs/paper/t1*.ipynb out.ipynb -p profile smoke`, in an empty report folder: what it needs is made first."
    from kernels import papermill
    notebook, = (root / "nbs" / "paper").glob("t1_*.ipynb")
    done = papermill(notebook, tmp_path / "out.ipynb", "-p", "profile", "smoke", "-p", "out", tmp_path / "report", timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "report" / "tables" / "table1.csv").exists()

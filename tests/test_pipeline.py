"""The runner as a command: kills, failures, bad arguments. The real paper runs in test_smoke.py."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from kernels import papermill

TOY = {
    "e1_slow": ([], "import time, numpy as np\nfrom hyperface.core import progress\nfor _ in progress(range(20), 'sleeping'): time.sleep(.1)\nrun.save('x', x=np.arange(5.) + seed)"),
    "e2_other": ([], "import numpy as np\nrun.save('y', y=np.ones(3))"),
    "t1_sum": (["e1_slow", "e2_other"], "import pandas as pd\nx, y = run.read('e1_slow/x')['x'], run.read('e2_other/y')['y']\nrun.table('sum', pd.DataFrame(dict(metric=['sum'], value=[x.sum() + y.sum()])), 'Table 1: a sum')"),
}


def write_toy(folder: Path, name: str, needs: list, code: str) -> None:
    cell, tag = nbformat.v4.new_code_cell, lambda t: {"tags": [t]}
    cells = [nbformat.v4.new_markdown_cell(f"# {name}"),
             cell("profile = 'quick'\nseed = 0\ndata = ''\nmodels = ''\nout = ''", metadata=tag("parameters")), cell(f"needs = {needs}", metadata=tag("step")),
             cell(f"from hyperface.report.results import Run\nrun = Run('{name}', profile=profile, seed=seed, data=data, models=models, out=out)"), cell(code), cell("run.done()")]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


@pytest.fixture
def paper(tmp_path):
    folder = tmp_path / "paper"
    folder.mkdir()
    for name, (needs, code) in TOY.items():
        write_toy(folder, name, needs, code)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The report of a run that nobody disturbed."
    folder, out = tmp_path_factory.mktemp("paper"), tmp_path_factory.mktemp("out")
    for name, (needs, code) in TOY.items():
        write_toy(folder, name, needs, code)
    assert run(folder, "reproduce", "--profile", "smoke", "--out", str(out)).returncode == 0
    return out


def command(paper: Path, *arguments: str, **kwargs) -> list[str]:
    return [sys.executable, "-m", "hyperface.cli", *arguments]


def environment(paper: Path) -> dict:
    return os.environ | {"HYPERFACE_NOTEBOOKS": str(paper), "HYPERFACE_PROGRESS": "1"}


def run(paper: Path, *arguments: str):
    return subprocess.run(command(paper, *arguments), env=environment(paper), capture_output=True, text=True, timeout=300)


def tables(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "tables").iterdir())}


def test_run_again_and_status(paper, tmp_path):
    out = tmp_path / "out"
    first = run(paper, "reproduce", "--profile", "smoke", "--out", str(out), "-j", "2")
    assert first.returncode == 0, first.stderr
    started = time.monotonic()
    again = run(paper, "reproduce", "--profile", "smoke", "--out", str(out))
    assert time.monotonic() - started < 15 and "up to date" in again.stdout
    listing = run(paper, "status", "--profile", "smoke", "--out", str(out))
    assert listing.stdout.count("fresh") == 3
    summary = json.loads((out / "run.json").read_text())
    assert summary["seed"] == 0 and summary["provenance"]["versions"]["numpy"] and summary["steps"]["t1_sum"]["seconds"] > 0
    assert (out / "index.html").exists() and (out / "notebooks" / "t1_sum.html").exists()


@pytest.mark.parametrize("after", [1.0, 4.5, 8.0])
def test_killed_at_any_moment_the_next_run_ends_with_the_same_tables(paper, tmp_path, undisturbed, after):
    killed = tmp_path / "b"
    process = subprocess.Popen(command(paper, "reproduce", "--profile", "smoke", "--out", str(killed)), env=environment(paper), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)      # the kernel, a child, must notice by itself
    process.wait()
    (killed / "tables").mkdir(parents=True, exist_ok=True)
    (killed / "tables" / ".sum-x1y2.csv.part").write_text("half a ta")   # what a kill in the middle of a write leaves
    done = run(paper, "reproduce", "--profile", "smoke", "--out", str(killed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(killed) == tables(undisturbed) and not list(killed.rglob(".*.part"))
    assert run(paper, "status", "--profile", "smoke", "--out", str(killed)).stdout.count("fresh") == 3


def test_a_failing_step_is_named_kept_and_repaired(paper, tmp_path):
    out = tmp_path / "out"
    write_toy(paper, "e2_other", [], "raise RuntimeError('the disk is on fire')")
    broken = run(paper, "reproduce", "--profile", "smoke", "--out", str(out))
    assert broken.returncode == 1 and "e2_other" in broken.stdout and "the disk is on fire" in broken.stdout
    assert "RuntimeError" in (out / "notebooks" / "e2_other.ipynb").read_text()
    assert (out / "results" / "e1_slow" / "x.npz").exists() and "the disk is on fire" in (out / "index.html").read_text()
    write_toy(paper, "e2_other", *TOY["e2_other"])
    mended = run(paper, "reproduce", "--profile", "smoke", "--out", str(out))
    assert mended.returncode == 0 and "e1_slow" not in mended.stdout


def test_what_changes_reruns_and_what_does_not_stays(paper, tmp_path):
    out = tmp_path / "out"
    assert run(paper, "reproduce", "--profile", "smoke", "--out", str(out)).returncode == 0
    nb = nbformat.read(paper / "t1_sum.ipynb", as_version=4)
    nb.cells[0].source += "\n\nMore prose."
    nbformat.write(nb, paper / "t1_sum.ipynb")
    os.utime(paper / "e1_slow.ipynb")
    assert "up to date" in run(paper, "reproduce", "--profile", "smoke", "--out", str(out)).stdout
    forced = run(paper, "reproduce", "--profile", "smoke", "--out", str(out), "--only", "t1", "--force")
    assert "t1_sum (forced)" in forced.stdout and "e1_slow" not in forced.stdout
    (out / "results" / "e2_other" / "y.npz").write_bytes(b"damaged")
    mended = run(paper, "reproduce", "--profile", "smoke", "--out", str(out))
    assert "e2_other (output missing or altered" in mended.stdout and "e1_slow" not in mended.stdout


def fragile_kernel(tmp_path: Path, deaths: int) -> dict:
    "An environment whose `python3` kernel dies the first times it is started, as one that lost its port to another process."
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    starter = tmp_path / "start.py"
    starter.write_text("import os, sys\nfrom pathlib import Path\nstarts = Path(__file__).with_name('starts')\nn = int(starts.read_text()) if starts.exists() else 0\n"
                       f"starts.write_text(str(n + 1))\nif n < {deaths}: sys.exit('Address already in use')\nos.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])\n")
    (spec / "kernel.json").write_text(json.dumps(dict(argv=[sys.executable, str(starter), "-f", "{connection_file}"], display_name="fragile", language="python")))
    return {"JUPYTER_PATH": str(tmp_path / "jupyter")}


@pytest.mark.parametrize("deaths", [2, 99])
def test_a_kernel_that_dies_at_its_start_is_replaced_and_not_for_ever(paper, tmp_path, deaths):
    out = tmp_path / "out"
    done = subprocess.run(command(paper, "reproduce", "--profile", "smoke", "--out", str(out), "--only", "e2"), env=environment(paper) | fragile_kernel(tmp_path, deaths), capture_output=True, text=True, timeout=300)
    assert int((tmp_path / "starts").read_text()) == 3                 # two died and one ran, or all three died
    if deaths == 2:
        assert done.returncode == 0 and (out / "results" / "e2_other" / "y.npz").exists(), done.stdout + done.stderr
    else:
        assert done.returncode == 1 and "3 kernels died before they could run a cell" in done.stdout


def test_a_page_alone_with_plain_papermill(paper, tmp_path):
    done = papermill(paper / "t1_sum.ipynb", tmp_path / "o.ipynb", "-p", "profile", "smoke", "-p", "out", tmp_path / "r", env=environment(paper), timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "r" / "tables" / "sum.csv").read_text() == "metric,value\nsum,13.0\n"


@pytest.mark.parametrize("arguments, says", [
    (["reproduce", "--profile", "qick"], "Did you mean quick?"), (["reproduce", "--profile", "smoke", "--only", "t9"], "Steps: e1_slow"),
    (["reproduce", "--profile", "smoke", "-j", "0"], "jobs"), (["reproduce", "--data", "/no/such/folder"], "does not exist"), (["reproduse"], "invalid choice")])
def test_bad_arguments_are_named(paper, tmp_path, arguments, says):
    done = run(paper, *arguments, *(["--out", str(tmp_path / "o")] if arguments[0] == "reproduce" else []))
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_unknown_parameters_and_untagged_notebooks_are_refused(paper, tmp_path):
    nb = nbformat.read(paper / "e2_other.ipynb", as_version=4)
    nb.cells[1].metadata = {}
    nbformat.write(nb, paper / "e2_other.ipynb")
    done = run(paper, "reproduce", "--profile", "smoke", "--out", str(tmp_path / "o"))
    assert done.returncode == 2 and "tagged `parameters`" in done.stderr


def test_read_only_target_says_so(paper, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    out = tmp_path / "o"
    out.mkdir(mode=0o500)
    done = run(paper, "reproduce", "--profile", "smoke", "--out", str(out))
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_unknown_need_or_an_empty_folder_is_named(paper, tmp_path, monkeypatch):
    from hyperface.core import ConfigError
    from hyperface.pipeline import find_steps
    for wrong, says in (("e1_slwo", "Did you mean e1_slow?"), ("zzzz", "Steps: e1_slow, e2_other, t1_sum")):
        write_toy(paper, "t1_sum", [wrong], "")
        with pytest.raises(ConfigError) as error:
            find_steps(paper)
        assert says in str(error.value)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HYPERFACE_NOTEBOOKS", str(tmp_path / "empty"))
    with pytest.raises(ConfigError) as error:
        find_steps()
    assert str(tmp_path / "empty") in str(error.value)

"""Every library notebook runs from top to bottom in a fresh kernel. Their cells are the unit tests."""
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hyperface.pipeline import with_kernel

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("[!._]*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("HYPERFACE_PUBLISH", "1")
    monkeypatch.delenv("HYPERFACE_RUNNER", raising=False)
    os.environ.pop("HYPERFACE_PROGRESS_FILE", None)
    nb = nbformat.read(path, as_version=4)
    with_kernel(lambda: NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}, extra_arguments=["--IPKernelApp.log_level=50"]).execute())

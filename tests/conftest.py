"""Shared by all tests: quiet progress bars, one thread a worker, real data where it is."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HYPERFACE_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYPERFACE_THREADS", "1")


def _real(variable: str, *inside: str) -> Path:
    folder = os.environ.get(variable, "").strip()
    path = Path(folder, *inside) if folder else None
    if path is None or not path.exists():
        pytest.skip(f"{variable} is not set or holds no {'/'.join(inside) or 'folder'}")
    return path


@pytest.fixture(scope="session")
def lfw() -> Path:
    "The folder of aligned LFW."
    return _real("HYPERFACE_DATA", "lfw")


@pytest.fixture(scope="session")
def arcface() -> Path:
    "A real ArcFace model."
    return _real("HYPERFACE_MODELS", "w600k_mbf_dequant_fp32.onnx")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def smoke_report(tmp_path_factory) -> Path:
    "The whole paper at the `smoke` profile, run once for all tests and all workers that look at it."
    import subprocess
    import sys

    from filelock import FileLock
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    out, log = shared / "smoke", shared / "smoke.log"
    with FileLock(shared / "smoke.lock"):
        if not log.exists():
            done = subprocess.run([sys.executable, "-m", "hyperface.cli", "reproduce", "--profile", "smoke", "--out", str(out), "-j", "2"], capture_output=True, text=True, timeout=1800)
            log.write_text(f"exit {done.returncode}\n{done.stdout[-5000:]}{done.stderr[-5000:]}")
    assert log.read_text().startswith("exit 0\n"), log.read_text()
    return out

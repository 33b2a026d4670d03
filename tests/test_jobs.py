"""Trainings that several processes share: what they say when they fail, and that they do not outlive the one that asked."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hyperface.core import ConfigError, DataError, HyperfaceError
from hyperface.data.jobs import process_count, read_job, shared_fit, write_job
from hyperface.data.rendered import render_faces
from hyperface.recognition.train import RecognitionTrainer, cached_training, recipe

TINY = recipe("cpu_smoke", image_size=32, batch=8, epochs=2, validate_every=0., seed=1)


@pytest.fixture(scope="module")
def people():
    return render_faces(6, 4, size=32, seed=5)


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("HYPERFACE_PROCESSES", "2")


def test_a_process_of_a_group_does_not_start_a_group(two, monkeypatch):
    assert process_count(8) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_count(8) == 1


def test_unset_it_is_one_for_each_gpu_as_far_as_they_divide_the_batch(monkeypatch):
    import torch
    monkeypatch.delenv("HYPERFACE_PROCESSES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert (process_count(128), process_count(96), process_count(7)) == (2, 3, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert process_count(128) == 1


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_nonsense_is_refused(monkeypatch, text):
    monkeypatch.setenv("HYPERFACE_PROCESSES", text)
    with pytest.raises(ConfigError, match="HYPERFACE_PROCESSES"):
        process_count(8)


def test_a_page_s_training_is_shared_and_read_back(people, two, tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERFACE_RUNS", str(tmp_path))
    result = cached_training(TINY, people)
    [folder] = (tmp_path / "cache" / "recognition").iterdir()
    assert len(result.history) == result.total and (folder / "processes.log").exists() and not (folder / "job").exists()
    monkeypatch.setenv("HYPERFACE_PROCESSES", "1")
    assert [h["loss"] for h in cached_training(TINY, people).history] == [h["loss"] for h in result.history]     # read, not trained again


def test_what_a_process_says_when_it_fails_reaches_the_caller(people, two, tmp_path):
    with pytest.raises(HyperfaceError, match="ended badly.*nonsense"):
        shared_fit(RecognitionTrainer, TINY, people, tmp_path / "run", device="nonsense")
    assert "nonsense" in (tmp_path / "run" / "processes.log").read_text()


def test_a_damaged_job_names_the_file(people, tmp_path):
    job = write_job(RecognitionTrainer, TINY, people, tmp_path)
    (job / "records" / "table.parquet").write_bytes(b"PAR1 half a table")
    with pytest.raises(DataError, match="table.parquet"):
        read_job(job)


LONG = """
import sys
from hyperface.data.jobs import shared_fit
from hyperface.data.rendered import render_faces
from hyperface.recognition.train import RecognitionTrainer, recipe
shared_fit(RecognitionTrainer, recipe("cpu_smoke", image_size=32, batch=8, epochs=4000, validate_every=0., seed=1), render_faces(6, 4, size=32, seed=5), sys.argv[1])
"""


def test_the_processes_end_with_the_one_that_asked(two, tmp_path):
    folder = tmp_path / "run"
    asked = subprocess.Popen([sys.executable, "-c", LONG, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    mine = lambda: subprocess.run(["pgrep", "-f", str(folder / "job")], capture_output=True, text=True).stdout.split()
    end = time.monotonic() + 120
    while not (folder / "run.json").exists() and time.monotonic() < end:
        time.sleep(.5)
    assert (folder / "run.json").exists() and len(mine()) >= 2
    os.kill(asked.pid, signal.SIGKILL)
    asked.wait()
    end = time.monotonic() + 60
    while mine() and time.monotonic() < end:
        time.sleep(.5)
    assert not mine()
    assert json.loads((folder / "job" / "job.json").read_text())["trainer"][1] == "RecognitionTrainer"          # the next run goes on from here

"""The trainer under stress: killed, poisoned, shared by two processes, on a full disk, with labels that make no sense; and its commands."""
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperface.core import ConfigError, DataError, fast_bfloat16
from hyperface.data.pairs import draw_pairs
from hyperface.data.records import Records
from hyperface.loop import read_log
from hyperface.recognition.train import NO_AUGMENT, RECIPES, RecognitionTrainer, class_labels, load_run, recipe
from hyperface.report.printed import number, printed

torch.set_num_threads(1)                                         # as in the processes below: sums are added in the same order
TINY = recipe("cpu_smoke", image_size=32, embedding_dim=32, batch=16, epochs=3, lr=.05, checkpoint_every=5)

SCRIPT = """
import sys, json; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_train import patches, TINY
from hyperface.recognition.train import RecognitionTrainer, recipe
from hyperface.config import from_dict
from hyperface.recognition.train import TrainConfig
from dataclasses import asdict
config = from_dict(TrainConfig, asdict(TINY) | json.loads(sys.argv[2]))
RecognitionTrainer(config, patches(), folder=sys.argv[1]).fit()
"""


def patches(identities: int = 8, per: int = 12, size: int = 32, **columns) -> Records:
    "Faces for a test: each identity has its own coarse pattern, each image its own noise. No rendering."
    g = np.random.default_rng(0)
    base = np.kron(g.integers(40, 215, (identities, 4, 4, 3)), np.ones((1, size // 4, size // 4, 1)))
    images = np.clip(np.repeat(base, per, 0) + g.normal(0, 25, (identities * per, size, size, 3)), 0, 255).astype(np.uint8)
    return Records.from_arrays(images, name="patches", identity=np.repeat(np.arange(identities), per), **columns)


def command(folder: Path, **changes) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(folder), json.dumps(changes)]


def curve(folder: Path) -> np.ndarray:
    return np.array([line["loss"] for line in read_log(folder / "log.jsonl")], float)


def quiet_fit(trainer, **kwargs):
    "Fit, and the warnings that were given."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return trainer.fit(**kwargs), [str(w.message) for w in told]


# --- killed -----------------------------------------------------------------------------------------------------------

def test_killed_and_resumed_the_curve_is_the_same(tmp_path):
    long = dict(epochs=10)                                       # 60 steps
    RecognitionTrainer(replace(TINY, **long), patches(), folder=tmp_path / "whole").fit()
    cut = tmp_path / "cut"
    process = subprocess.Popen(command(cut, **long))
    until = time.monotonic() + 120
    while time.monotonic() < until and len(read_log(cut / "log.jsonl")) < 18:
        time.sleep(.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(curve(cut))
    assert 18 <= done < 60, "killed too early or too late to tell anything"
    RecognitionTrainer(replace(TINY, **long), patches(), folder=cut).fit()
    assert len(curve(cut)) == 60
    np.testing.assert_allclose(curve(cut), curve(tmp_path / "whole"), rtol=0, atol=1e-6)
    assert torch.equal(*[load_run(f).backbone.state_dict()["fc.weight"] for f in (cut, tmp_path / "whole")])


@pytest.mark.parametrize("changes", [dict(ema=200.), dict(sample_rate=.6), dict(head="adaface", schedule="steps", drops=(1., 2.))], ids=["averaged", "sampled centres", "adaface"])
def test_every_part_of_the_state_is_resumed(tmp_path, changes):
    config = replace(TINY, **changes)
    whole = RecognitionTrainer(config, patches()).fit()
    RecognitionTrainer(config, patches(), folder=tmp_path).fit(stop_at=7)
    resumed = RecognitionTrainer(config, patches(), folder=tmp_path).fit()
    assert [line["loss"] for line in resumed.history] == [line["loss"] for line in whole.history]
    assert all(torch.equal(a, b) for a, b in zip(resumed.network.state_dict().values(), whole.network.state_dict().values()))


def test_another_configuration_or_other_data_is_refused_by_name(tmp_path):
    RecognitionTrainer(TINY, patches(), folder=tmp_path).fit(stop_at=2)
    with pytest.raises(ConfigError, match="another lr, augment"):
        RecognitionTrainer(replace(TINY, lr=.1, augment=NO_AUGMENT), patches(), folder=tmp_path).fit()
    with pytest.raises(ConfigError, match="another data"):
        RecognitionTrainer(TINY, patches().select(np.arange(95, -1, -1)), folder=tmp_path).fit()


# --- not finite -------------------------------------------------------------------------------------------------------

class PoisonedImages(RecognitionTrainer):
    steps = (4,)

    def batch(self, step):
        images, *rest = super().batch(step)
        if step in self.steps:
            images[2, 1, 3, 3] = math.nan
        return images, *rest


def test_nan_in_an_image_is_left_out_named_and_recovered_from():
    trainer = PoisonedImages(TINY, patches())
    result, told = quiet_fit(trainer)
    name = patches().table["image"][trainer.batch(4)[-1][2]]
    assert any(f"Step 4 was left out: image {name} is not finite" in w for w in told)
    assert result.skipped == 1 and result.history[4]["skipped"].endswith(name) and math.isnan(result.history[4]["loss"])
    assert all(torch.isfinite(v).all() for v in result.network.state_dict().values() if v.is_floating_point())
    sound = RecognitionTrainer(TINY, patches()).fit()
    assert [line["loss"] for line in result.history[:4]] == [line["loss"] for line in sound.history[:4]]
    assert result.history[5]["lr"] == pytest.approx(sound.history[5]["lr"] / 2)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_nan_in_a_gradient_does_not_reach_the_weights():
    trainer = RecognitionTrainer(TINY, patches())
    calls = []

    def poison(grad):
        calls.append(0)
        return grad * math.nan if len(calls) == 3 else grad

    trainer.network.backbone.fc.weight.register_hook(poison)
    result, told = quiet_fit(trainer)
    assert sum("the gradient is not finite" in w for w in told) == 1 and result.skipped == 1
    assert all(torch.isfinite(v).all() for v in result.network.state_dict().values() if v.is_floating_point())


def test_nan_in_the_gradient_of_the_centres_is_seen():
    trainer = RecognitionTrainer(TINY, patches())
    calls = []
    trainer.network.head.weight.register_hook(lambda g: (calls.append(0), g * math.nan if len(calls) == 3 else g)[1])
    result, told = quiet_fit(trainer)
    assert sum("the gradient is not finite" in w for w in told) == 1 and torch.isfinite(result.network.head.weight).all()


def test_too_many_bad_steps_end_the_training_and_the_checkpoint_is_sound(tmp_path):
    class Poisoned(PoisonedImages):
        steps = range(7, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="not finite 4 times in a row"):
            Poisoned(replace(TINY, patience=4), patches(), folder=tmp_path).fit()
    resumed = RecognitionTrainer(replace(TINY, patience=4), patches(), folder=tmp_path).fit()
    lines = read_log(tmp_path / "log.jsonl")
    assert len(lines) == resumed.total and [line["step"] for line in lines if "skipped" in line] == [7, 8, 9]   # the checkpoint is of step 10
    assert all(torch.isfinite(v).all() for v in resumed.network.state_dict().values() if v.is_floating_point()) and lines[-1]["loss"] < lines[0]["loss"]


def test_a_lowered_rate_rises_again_after_a_hundred_good_steps():
    class Patient(PoisonedImages):
        def train_step(self, step, *batch):
            if step == 8:
                assert self.good == 3
                self.good = 97
            return super().train_step(step, *batch)
    result, _ = quiet_fit(Patient(replace(TINY, schedule="constant", warmup=0.), patches()))
    rates = [line["lr"] for line in result.history]
    assert rates[3] == TINY.lr and rates[5:11] == [TINY.lr / 2] * 6 and set(rates[11:]) == {TINY.lr}


# --- two processes ----------------------------------------------------------------------------------------------------

def test_two_processes_compute_what_one_computes(tmp_path):
    calm = dict(precision="float32", lr=.01)     # where bf16 is fast, "auto" takes it, and its sums depend on their order; at TINY's rate rounding grows from step to step
    RecognitionTrainer(replace(TINY, **calm), patches(), folder=tmp_path / "one").fit()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    both = [subprocess.Popen(command(tmp_path / "two", **calm), env=base | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 18
    np.testing.assert_allclose(two[:3], one[:3], rtol=1e-5)
    np.testing.assert_allclose(two, one, rtol=.05)
    assert load_run(tmp_path / "two").n_classes == 8


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    import hyperface.recognition.train as module
    monkeypatch.setattr(module.Ranks, "here", lambda device=None: module.Ranks(0, 3))
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        RecognitionTrainer(TINY, patches())


# --- labels -----------------------------------------------------------------------------------------------------------

def test_a_class_with_one_image_and_an_empty_class_are_told_and_trained():
    labels = np.repeat(np.arange(8), 12)
    labels[0], labels[labels == 5] = 9, 6                        # class 9 has one image, 5 and 8 none
    result, told = quiet_fit(RecognitionTrainer(TINY, patches(), labels=labels, n_classes=10))
    assert "1 classes with one image" in told and "2 classes without an image" in told
    assert result.n_classes == 10 and result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("labels, says", [(np.full(96, 3), "one identity only"), (np.arange(96) - 1, "outside 0"), (np.arange(95), "one whole number for each image"), (np.zeros(96), "whole number")])
def test_labels_that_make_no_sense(labels, says):
    with pytest.raises(DataError, match=says):
        class_labels(patches(), labels)


def test_labels_beyond_the_classes_name_the_image():
    with pytest.raises(DataError, match=r"outside 0\.\.3 \(got 4\).*image 00000048"):
        class_labels(patches(), np.repeat(np.arange(8), 12), 4)


def test_images_without_identity_are_left_out():
    records = patches()
    table = dict(identity=[None if i % 4 == 0 else f"p{i // 12}" for i in range(96)])
    records = Records.from_arrays(np.stack([records.pixels(i) for i in range(96)]), **table)
    result, told = quiet_fit(RecognitionTrainer(TINY, records), stop_at=3)
    assert "24 images without identity left out" in told and result.n_images == 72


def attributed() -> Records:
    "Patches with every attribute, half of all labels missing."
    g = np.random.default_rng(1)
    some = lambda values: np.where(g.random(96) < .5, values, None)
    number_or_nan = lambda values: np.where(g.random(96) < .5, values, np.nan).astype(np.float32)
    return patches(age=number_or_nan(g.integers(18, 70, 96)), yaw=number_or_nan(g.normal(0, 20, 96)), pitch=number_or_nan(g.normal(0, 5, 96)), roll=number_or_nan(g.normal(0, 5, 96)),
                   gender=some(g.choice(["female", "male"], 96)), ethnicity=some(g.choice(["white", "black", "asian", "indian"], 96)), expression=some(g.choice(["neutral", "happy"], 96)))


@pytest.mark.parametrize("changes", [dict(tasks=("pose", "age", "expression", "gender", "ethnicity")), dict(tasks=("age", "gender"), weighting="learnt"), dict(attention="demographic")], ids=["five tasks", "learnt weights", "attention"])
def test_half_of_all_attribute_labels_missing(tmp_path, changes):
    config = replace(TINY, **changes)
    result = RecognitionTrainer(config, attributed(), folder=tmp_path).fit()
    assert all(math.isfinite(line["loss"]) for line in result.history) and result.history[-1]["loss"] < result.history[0]["loss"]
    names = {f"{t}_loss" for t in changes.get("tasks", ())} | ({"group_loss"} if "attention" in changes else set())
    assert names <= set().union(*map(set, result.history))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(load_run(tmp_path).backbone(x), result.backbone(x), rtol=1e-4, atol=1e-5)


def test_a_task_without_any_label_is_refused():
    with pytest.raises(DataError, match="no label for gender"):
        RecognitionTrainer(replace(TINY, tasks=("gender",)), patches())


def test_weights_and_ramps_of_tasks_reach_the_loss():
    first = lambda **changes: RecognitionTrainer(replace(TINY, tasks=("age", "gender"), **changes), attributed()).fit(stop_at=1).history[0]
    plain, zero, heavy, ramped = first(), first(task_weights=(0., 0.)), first(task_weights=(0., 2.)), first(task_weights=(3., 2.), task_ramps=(1., 1.))
    assert heavy["gender_loss"] == pytest.approx(plain["gender_loss"]) and heavy["gender_loss"] > 0
    assert zero["loss"] == pytest.approx(zero["identity_loss"], rel=1e-6)
    assert heavy["loss"] == pytest.approx(zero["loss"] + 2 * heavy["gender_loss"], rel=1e-5)
    assert ramped["loss"] == pytest.approx(zero["loss"], rel=1e-6)             # the first step of a ramp counts nothing
    with pytest.raises(ConfigError, match="task_ramps must have one number for each task"):
        replace(TINY, tasks=("age", "gender"), task_ramps=(1.,))


def test_a_mirrored_image_has_a_mirrored_pose():
    config = replace(TINY, tasks=("pose",), augment=replace(NO_AUGMENT, flip=.5))
    trainer = RecognitionTrainer(config, patches(yaw=np.full(96, 20.), pitch=np.full(96, 3.), roll=np.full(96, -4.)))
    images, _, targets, rows = trainer.batch(0)
    plain = torch.from_numpy(trainer.store[rows]).permute(0, 3, 1, 2) / 127.5 - 1
    mirrored = torch.tensor([torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(images, plain)])
    assert 0 < mirrored.sum() < len(rows) and torch.equal(targets["pose"][:, 0] < 0, mirrored)
    assert torch.equal(targets["pose"][mirrored][0], torch.tensor([-20., 3., 4.]))


# --- disk -------------------------------------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        RecognitionTrainer(TINY, patches(), folder=tmp_path / "file" / "run")


def test_a_disk_that_fills_up_says_so_and_the_run_goes_on_later(tmp_path):
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    words = command(tmp_path)
    words[2] = limited + words[2]
    full = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert full.returncode and "The disk is full or may not be written" in full.stderr.splitlines()[-1]
    assert not list((tmp_path / "checkpoints").glob("step-*.pt"))
    RecognitionTrainer(TINY, patches(), folder=tmp_path).fit()
    assert len(curve(tmp_path)) == 18


# --- recipes and precision --------------------------------------------------------------------------------------------

def test_the_appendix_recipe_says_what_is_printed():
    paper, ours = printed("vec2face_table2").set_index("setting")["value"], RECIPES["vec2face"]
    assert ours.head == paper["Head"].lower() and "iresnet50_se" == ours.backbone and paper["Backbone"] == "SE-IR50"
    assert f"{ours.image_size}×{ours.image_size}" == paper["Input Size"]
    for name, value in (("Batch Size", ours.batch), ("Learning Rate", ours.lr), ("Weight Decay", ours.weight_decay), ("Momentum", ours.momentum), ("Epochs", ours.epochs), ("Margin", ours.margin), ("Sample Rate", ours.sample_rate)):
        assert number(paper[name]) == value, name
    assert json.loads(paper["Reduce Learning Rate"]) == list(ours.drops) and ours.augment.erase > 0 and ours.augment.brightness > 0


def test_rates_of_the_appendix_recipe_fall_where_they_should():
    trainer = RecognitionTrainer(replace(TINY, epochs=26, schedule="steps", drops=(12., 20., 24.), lr=.1, warmup=0.), patches())
    rates = [round(trainer.rate_at(e * trainer.per_epoch), 9) for e in range(26)]
    assert rates == [.1] * 12 + [.01] * 8 + [.001] * 4 + [.0001] * 2


def test_insightface_recipe():
    c = RECIPES["insightface"]
    assert (c.schedule, c.lr, c.batch, c.epochs, c.clip, c.weight_decay, c.scale, c.margin) == ("poly", .1, 128, 20, 5., 5e-4, 64., .5)


def test_bf16_on_a_cpu_trains_and_warns_where_it_is_slow():
    result, told = quiet_fit(RecognitionTrainer(replace(TINY, precision="bf16"), patches()), stop_at=3)
    assert result.precision == "bf16" and all(math.isfinite(line["loss"]) for line in result.history)
    plain = RecognitionTrainer(replace(TINY, precision="float32"), patches()).fit(stop_at=3)
    assert result.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=.05)


@pytest.mark.skipif(fast_bfloat16("cpu"), reason="this CPU has bf16")
def test_auto_precision_does_not_take_emulated_bf16():
    with pytest.warns(UserWarning, match="emulates bf16"):
        RecognitionTrainer(replace(TINY, precision="bf16"), patches())
    assert RecognitionTrainer(TINY, patches()).precision == "float32"


def test_it_learns_and_verifies():
    records = patches(12, 12)
    train, other = records.select(np.arange(96)), records.select(np.arange(96, 144))
    result = RecognitionTrainer(replace(TINY, epochs=6, validate_every=3.), train, draw_pairs(other, 100, 100, folds=1)).fit()
    assert list(result.validation()["step"]) == [17, 35] and result.summary()["val_eer"] < .2 and result.finished


def test_a_training_is_kept_by_its_content(tmp_path, monkeypatch):
    import hyperface.recognition.train as module
    monkeypatch.setenv("HYPERFACE_RUNS", str(tmp_path))
    first = module.cached_training(TINY, patches())
    monkeypatch.setattr(module.RecognitionTrainer, "train_step", None)             # any step would be an error
    again = module.cached_training(TINY, patches())
    assert [line["loss"] for line in again.history] == [line["loss"] for line in first.history]
    with pytest.raises(TypeError):
        module.cached_training(replace(TINY, seed=1), patches())
    with pytest.raises(TypeError):
        module.cached_training(TINY, patches().select(np.arange(1, 96)))


# --- commands ---------------------------------------------------------------------------------------------------------

def cli(capsys, *words: str):
    "Exit status, standard output and standard error of a command."
    from hyperface.cli import main
    capsys.readouterr()
    code = main(list(words))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "head.safetensors", "model.safetensors", "log.jsonl"])
def test_a_kept_training_that_was_cut_off_is_made_again(tmp_path, monkeypatch, name):
    import hyperface.recognition.train as module
    monkeypatch.setenv("HYPERFACE_RUNS", str(tmp_path))
    first = module.cached_training(TINY, patches())
    path, = tmp_path.rglob(name)
    os.truncate(path, path.stat().st_size // 2)
    again = module.cached_training(TINY, patches())
    assert all(torch.equal(a, b) for a, b in zip(first.network.state_dict().values(), again.network.state_dict().values()))


def test_train_and_export_as_commands(tmp_path, capsys):
    data, out = tmp_path / "faces", tmp_path / "run"
    patches(10, 8).save(data)
    words = ["train", "--data", str(data), "--recipe", "cpu_smoke", "--size", "32", "--dim", "64", "--head", "cosface", "--epochs", "2", "--batch", "16", "--hold-out", ".3", "-o", str(out)]
    code, shown, err = cli(capsys, *words)
    assert code == 0 and "val_eer" in shown, err
    assert (out / "model.safetensors").exists() and (out / "config.yaml").exists() and len(curve(out)) == 6
    code, _, err = cli(capsys, *words, "--lr", ".2")
    assert code == 2 and "another lr" in err
    code, _, err = cli(capsys, "export", str(out), "-o", str(tmp_path / "model.onnx"))
    assert code == 0, err
    from hyperface.extraction.embed import load_embedder
    faces = patches(4, 2, size=112)                              # the file takes crops of 112 pixels and reduces them itself
    theirs = load_embedder(str(tmp_path / "model.onnx")).embed(faces.images())
    with torch.no_grad():
        ours = torch.nn.functional.normalize(load_run(out).backbone(torch.from_numpy(faces.images(size=32)))).numpy()
    assert (theirs * ours).sum(1).min() > .9999


@pytest.mark.parametrize("words, says", [
    (["train", "--recipe", "cpu_quik", "-o", "{}/r"], "Did you mean cpu_quick?"), (["train", "--head", "arcfase", "-o", "{}/r"], "head must be one of"),
    (["train", "--data", "{}/nothing", "-o", "{}/r"], "There is no such data set"), (["train", "--tasks", "mood", "-o", "{}/r"], "unknown task"),
    (["train", "--hold-out", "1.5", "-o", "{}/r"], "--hold-out must lie in"), (["train", "--precision", "fp16", "--identities", "4", "--per-identity", "4", "--size", "32", "--hold-out", "0", "-o", "{}/r"], "fp16 needs a CUDA device"),
    (["export", "{}/nothing", "-o", "{}/m.onnx"], "no such folder"), (["export", "{}", "-o", "{}/m.onnx"], "holds no finished training"), (["export", "{}", "-o", "{}/m.pt"], "must end in .onnx")])
def test_commands_say_what_is_wrong(tmp_path, capsys, words, says):
    code, _, err = cli(capsys, *[w.format(tmp_path) for w in words])
    assert code == 2 and says in err, err

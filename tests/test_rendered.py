"""Rendered faces: the same bits however they are made, labels that are true, nonsense refused, and what real models see."""
import os
import subprocess
import sys

import numpy as np
import pytest

from hyperface.core import ConfigError, DataError, models_dir
from hyperface.data.rendered import (CONDITIONS, DIMENSIONS, GROUPS, Identities, apply_bias, broken, draw_conditions, draw_identities, interpolate,
                                     make_conditions, render, render_faces, sweep)

TEMPLATE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERFACE_RUNS", str(tmp_path))
    monkeypatch.setenv("HYPERFACE_PROGRESS", "0")
    return tmp_path


def pixels(records):
    return np.stack([records.pixels(i) for i in range(len(records))])


def need(name):
    if models_dir() is None or not (models_dir() / name).exists():
        pytest.skip(f"HYPERFACE_MODELS has no {name}")
    return str(models_dir() / name)


def session(name):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(need(name), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("size", [33, 64, 112])
def test_bits_do_not_depend_on_the_batch(size):
    people, conditions = draw_identities(11, 5), draw_conditions(11, 1.0, 5)
    whole, labels = render(people, conditions, size, uint8=True)
    for batch in (1, 3, 4):
        other, same = render(people, conditions, size, uint8=True, batch_size=batch)
        assert (other == whole).all()
        assert all((same[k] == labels[k]).all() for k in labels)


def test_bits_do_not_depend_on_the_number_of_threads():
    import torch
    people, conditions = draw_identities(4, 1), draw_conditions(4, 1.0, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = render(people, conditions, 64)[0]
        torch.set_num_threads(2)
        assert (render(people, conditions, 64)[0] == one).all()
        assert torch.get_num_threads() == 2                      # left as it was
    finally:
        torch.set_num_threads(before)


def test_processes_cache_and_a_fresh_run_agree(runs):
    direct = render_faces(70, 4, size=32, seed=3, cache=False)
    cached = render_faces(70, 4, size=32, seed=3, processes=2)
    assert (pixels(direct) == pixels(cached)).all()
    assert direct.table.drop(columns="image").equals(cached.table.drop(columns="image")) or (direct.table["yaw"].to_numpy() == cached.table["yaw"].to_numpy()).all()
    shards = sorted((runs / "cache" / "rendered").rglob("shard-*.npy"))
    assert len(shards) == 3
    stamps = [s.stat().st_mtime_ns for s in shards]
    again = render_faces(70, 4, size=32, seed=3)
    assert [s.stat().st_mtime_ns for s in shards] == stamps and (pixels(again) == pixels(direct)).all()


def test_a_killed_run_continues(runs):
    first = pixels(render_faces(70, 4, size=24, seed=4))
    shards = sorted((runs / "cache" / "rendered").rglob("shard-*.npy"))
    shards[1].unlink()                                           # killed between table and pixels
    shards[2].with_suffix(".parquet").unlink()                   # and before the table
    (shards[0].parent / ".shard-000001-xyz.npy.part").write_bytes(b"half")
    keep = shards[0].stat().st_mtime_ns
    assert (pixels(render_faces(70, 4, size=24, seed=4)) == first).all()
    assert shards[0].stat().st_mtime_ns == keep


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("kept", [0, .5])
def test_a_shard_that_was_cut_off_is_rendered_again(runs, suffix, kept):
    first = render_faces(70, 4, size=24, seed=4)
    images, yaw = pixels(first), first.table["yaw"].to_numpy()
    path = sorted((runs / "cache" / "rendered").rglob("shard-*" + suffix))[1]
    del first
    os.truncate(path, int(kept * path.stat().st_size))
    again = render_faces(70, 4, size=24, seed=4)
    assert (pixels(again) == images).all() and (again.table["yaw"].to_numpy() == yaw).all()


def test_a_script_without_main_guard_may_use_processes(runs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from hyperface.data.rendered import render_faces\nprint(len(render_faces(60, 5, size=16, processes=2)))\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=dict(os.environ, HYPERFACE_RUNS=str(tmp_path)))
    assert done.returncode == 0 and done.stdout.strip() == "300", done.stderr[-500:]


def test_people_and_pictures_do_not_depend_on_how_many_there_are():
    small, large = render_faces(3, 3, size=32, seed=9, cache=False), render_faces(6, 3, size=32, seed=9, cache=False)
    assert (pixels(small) == pixels(large)[:9]).all()
    assert not (pixels(render_faces(3, 3, size=32, seed=10, cache=False)) == pixels(small)).all()


@pytest.mark.parametrize("wrong", [dict(yaw=200), dict(yaw=np.nan), dict(intensity=-1), dict(expression="bored"), dict(colour="red"), dict(size=8), dict(size=600), dict(size=64.5), dict(size="64"),
                                   dict(nuisance=np.nan), dict(nuisance=-1), dict(ages=(-3, -1)), dict(ages=(90, 200)), dict(groups={"martian": 1}), dict(groups={"white": -1}), dict(genders={"x": 1}),
                                   dict(bias={"martian": {}}), dict(bias={"white": {"yaw": 300}}), dict(bias={"white": {"sparkle": 1}})])
def test_nonsense_is_refused_by_name(wrong, runs):
    with pytest.raises(ConfigError) as error:
        render_faces(2, 2, **wrong)
    name = next(iter(wrong))
    assert name.rstrip("s") in str(error.value) or any(w in str(error.value) for w in ("ethnicity", "gender", "age", "shares", "yaw", "bias", "condition", "colour"))
    assert not list(runs.rglob("shard-*"))                       # before any work


@pytest.mark.parametrize("n,per", [(2.5, 2), (-1, 2), (2, -1), (np.nan, 1), ("3", 1), (None, 1)])
def test_counts_must_be_whole_numbers(n, per):
    with pytest.raises(ConfigError, match="whole number"):
        render_faces(n, per)


def test_bad_identities_are_refused():
    people = draw_identities(3, 0)
    with pytest.raises(ConfigError, match="age"):
        people.set(age=-3)
    with pytest.raises(ConfigError, match="age"):
        people.set(age=np.nan)
    with pytest.raises(ConfigError, match="gender"):
        people.set(gender="?")
    with pytest.raises(ConfigError, match="skin_tone"):
        people.set(skin_tone=2)
    with pytest.raises(ConfigError, match="identity vector"):
        render(people.set(nose_width=np.inf), make_conditions(3))
    with pytest.raises(DataError):
        render(Identities(people.vector[:, :5], people.table), make_conditions(3))
    with pytest.raises(DataError, match="as many identities"):
        render(people, make_conditions(2))


def test_empty_and_single():
    images, labels = render(draw_identities(0), make_conditions(0))
    assert images.shape == (0, 3, 112, 112) and all(len(v) == 0 for v in labels.values())
    assert len(render_faces(0, 5)) == 0 and len(render_faces(5, 0)) == 0
    assert render(draw_identities(1), make_conditions(1))[0].shape == (1, 3, 112, 112)


@pytest.mark.parametrize("size", [16, 17, 50, 112, 200, 512])
def test_sizes(size):
    people, conditions = draw_identities(2, 3), make_conditions(2)
    images, labels = render(people, conditions, size)
    assert images.shape == (2, 3, size, size) and np.isfinite(images).all() and np.abs(images).max() <= 1
    reference = render(people, conditions, 112)[1]
    assert np.allclose(labels["lm2x"] / size, reference["lm2x"] / 112, atol=.01)   # the same place in the picture
    assert (broken(images) == "").all()


def test_landmarks_lie_near_the_template_and_follow_the_pose():
    people = draw_identities(40, 8)
    labels = render(people, make_conditions(40))[1]
    marks = np.stack([[labels[f"lm{i}x"], labels[f"lm{i}y"]] for i in range(5)]).transpose(2, 0, 1)
    assert np.abs(marks.mean(0) - TEMPLATE).max() < 4
    turned = render(people[[0]], make_conditions(3, yaw=[-40, 0, 40]))[1]
    assert (np.diff(turned["lm2x"] - (turned["lm0x"] + turned["lm1x"]) / 2) > 0).all()
    nodded = render(people[[0]], make_conditions(3, pitch=[-20, 0, 20]))[1]
    assert (np.diff(nodded["lm2y"] - (nodded["lm0y"] + nodded["lm3y"]) / 2) < 0).all()


def test_roll_is_what_the_picture_shows():
    person = draw_identities(1, 8)
    tilted = render(person, make_conditions(2, roll=[0, 20]), align=False)[1]
    slope = np.degrees(np.arctan2(tilted["lm1y"] - tilted["lm0y"], tilted["lm1x"] - tilted["lm0x"]))
    assert abs((slope[1] - slope[0]) - 20) < 2 and abs(tilted["roll"][1] - 20) < 1e-4    # clockwise: the right eye is lower
    straight = render(person, make_conditions(2, roll=[0, 20]))[1]
    assert np.abs(straight["roll"]).max() < 3 and straight["head_roll"][1] == 20


def test_visibility():
    people = draw_identities(1, 2)
    c = make_conditions(5, mask=[0, 1, 0, 0, 0], scarf=[0, 0, 1, 0, 0], glasses=[0, 0, 0, 2, 1])
    assert np.allclose(render(people, c)[1]["visibility"], [1, .4, .6, .6, 1])
    side = render(people, make_conditions(2, yaw=[-80, 80]))[1]
    assert not side["lm0seen"][0] and side["lm1seen"][0] and side["lm0seen"][1] and not side["lm1seen"][1]  # the far eye is hidden


def test_every_condition_changes_the_picture_or_is_known_not_to():
    people = draw_identities(1, 6, genders=dict(male=1), groups=dict(white=1), ages=(25, 26)).set(beard=1.5, length=.2, fringe=0, style=1)
    base = make_conditions(1, seed=3)
    reference = render(people, base)[0]
    high = dict(age_change=30, yaw=20, roll=15, light_elevation=60, backlight=2, distance=5, jpeg=20, beard=0, fringe=1, makeup=1, seed=4, contrast=1.4, exposure=1.4, saturation=0, light_azimuth=-60, background=0)
    silent = [k for k in CONDITIONS if k not in ("intensity",) and (render(people, base.assign(**{k: high.get(k, CONDITIONS[k][2] if k != "jitter" else 3)}))[0] == reference).all()]
    assert silent in ([], ["hair_length"]), silent               # a change of length may lie below the picture


def test_interpolation_and_sweep():
    a, b = draw_identities(1, 1), draw_identities(1, 2)
    way = interpolate(a, b, 5)
    assert np.allclose(way.vector[2], (a.vector[0] + b.vector[0]) / 2, atol=1e-6) and len(way) == 5
    wide = sweep(a, "nose_width", [-2, 2])
    changed = np.flatnonzero((wide.vector[0] != wide.vector[1]))
    assert changed.tolist() == [DIMENSIONS.index("nose_width")]


def test_shares_and_bias_are_as_stated():
    people = draw_identities(3000, 4, groups=dict(white=3, black=1), genders=dict(female=.7, male=.3), ages=dict(white=(20, 30), black=(60, 70)))
    t = people.table
    assert abs((t.ethnicity == "white").mean() - .75) < .025 and abs((t.gender == "female").mean() - .7) < .025
    assert t[t.ethnicity == "white"].age.between(20, 30).all() and t[t.ethnicity == "black"].age.between(60, 70).all()
    c = apply_bias(draw_conditions(3000, 0.5, 4), t.ethnicity, dict(black=dict(exposure=(.3, .5), expression={"anger": .8, "neutral": .2})), seed=4)
    black = (t.ethnicity == "black").to_numpy()
    assert c.exposure[black].between(.3, .5).all() and c.exposure[~black].mean() > .8
    assert abs((c.expression[black] == "anger").mean() - .8) < .05
    faces = render_faces(6, 2, size=32, cache=False, bias=dict(female=dict(glasses=1), male=dict(glasses=0)))
    assert ((faces.table.glasses > 0) == (faces.table.gender == "female")).all()


def test_nuisance_grows():
    spread = [draw_conditions(500, s, 1).yaw.std() for s in (0, .3, 1)]
    assert spread[0] == 0 and spread[0] < spread[1] < spread[2]
    a, b = render_faces(1, 2, nuisance=0, cache=False), render_faces(1, 2, nuisance=1, cache=False)
    difference = lambda r: np.abs(r.pixels(0).astype(float) - r.pixels(1)).mean()
    assert difference(a) < 3 < difference(b)


def test_planted_faults_are_found():
    r = render_faces(20, 5, seed=30, cache=False)
    images = r.images()
    assert (broken(images) == "").all()
    bad = images[:6].copy()
    bad[0] = 0
    bad[1] = np.nan
    bad[2] = 1
    bad[3, :, 28:84, 28:84] = .2
    bad[4, :, 40:100, 20:90] = bad[4, :, :1, :1]
    bad[5] = -1
    assert (broken(bad) != "").all()
    astray = np.tile(TEMPLATE, (1, 1, 1)) + 500
    assert broken(images[:1], astray)[0] == "landmarks astray"


def test_save_and_load(tmp_path):
    r = render_faces(3, 2, size=48, seed=2, cache=False)
    r.save(tmp_path / "set")
    loaded = type(r).load(tmp_path / "set")
    assert len(loaded) == 6 and (loaded.table["identity"].astype(str).to_numpy() == r.table["identity"].astype(str).to_numpy()).all()
    assert np.allclose(loaded.table["lm2x"], r.table["lm2x"])


def test_importing_is_light():
    done = subprocess.run([sys.executable, "-c", "import sys, hyperface.data.rendered; print([m for m in ('insightface', 'onnxruntime', 'matplotlib', 'sklearn', 'joblib') if m in sys.modules])"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-300:]


def test_a_real_detector_finds_the_faces():
    need("det_500m.onnx")
    import cv2
    from insightface.model_zoo.scrfd import SCRFD
    detector = SCRFD(need("det_500m.onnx"), session=session("det_500m.onnx"))
    detector.prepare(-1, input_size=(320, 320), det_thresh=.5)
    for nuisance, least in ((0, 1.0), (.4, .99)):
        r = render_faces(50, 1, nuisance=nuisance, seed=41, cache=False)
        found, errors = 0, []
        for i in range(len(r)):
            x = cv2.copyMakeBorder(r.pixels(i), 104, 104, 104, 104, cv2.BORDER_CONSTANT, value=(127, 127, 127))
            boxes, marks = detector.detect(x[..., ::-1].copy())
            found += len(boxes) > 0
            if len(boxes):
                row = r.table.iloc[i]
                truth = np.array([[row[f"lm{k}x"], row[f"lm{k}y"]] for k in range(5)])
                errors.append(np.linalg.norm(marks[0] - 104 - truth, axis=1).mean() / 35.2)
        assert found / len(r) >= least and np.mean(errors) < .13


def test_a_real_recogniser_tells_the_people_apart():
    net = session("w600k_mbf_dequant_fp32.onnx")
    name = net.get_inputs()[0].name
    for nuisance, low, high in ((0.0, 0, .01), (1.0, .05, .20)):
        r = render_faces(30, 3, nuisance=nuisance, seed=12, cache=False)
        e = np.concatenate([net.run(None, {name: x})[0] for _, x in r.batches(32)])
        e /= np.linalg.norm(e, axis=1, keepdims=True)
        i, j = np.triu_indices(len(e), 1)
        score, same = (e @ e.T)[i, j], r.identities[i] == r.identities[j]
        t = np.quantile(score, np.linspace(.5, .999, 800))
        reject, accept = np.array([(score[same] < x).mean() for x in t]), np.array([(score[~same] >= x).mean() for x in t])
        k = np.argmin(np.abs(reject - accept))
        assert low <= (reject[k] + accept[k]) / 2 <= high


def test_a_real_pose_network_reads_the_yaw():
    import cv2
    nets = [session(f"fsanet-{k}-iter-688590.onnx") for k in ("1x1", "var")]
    yaw = np.linspace(-55, 55, 23)
    images = render(draw_identities(23, 77), make_conditions(23, yaw=yaw), uint8=True)[0]
    prepare = lambda x: ((cv2.resize(cv2.copyMakeBorder(x, 10, 10, 10, 10, cv2.BORDER_REPLICATE)[..., ::-1], (64, 64)).astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None]
    read = [np.mean([n.run(None, {n.get_inputs()[0].name: prepare(x)})[0].ravel()[0] for n in nets]) for x in images]
    assert abs(np.corrcoef(read, yaw)[0, 1]) >= .95

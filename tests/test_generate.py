"""A data set from any generator: kills, ranks, damage, filters, containers, provenance, refusals."""
import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import hyperface.generate as module
from hyperface.core import ConfigError, DataError, MissingWeights, read_json, torch_rng
from hyperface.data.containers import read_lmdb, read_rec, read_zip
from hyperface.data.images import decode_image
from hyperface.data.records import Records
from hyperface.generate import (Recipe, RenderedFaces, call_generator, check_dataset, expected_dim, generate_dataset, load_generator_by_name, rendered_person, weights_key,
                                write_containers)
from hyperface.identities import IdentitySet, SamplingPlan, Target, make_identities, plan_pictures


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No flushing of the machine's disks, no git for every little set."
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(module, "provenance", lambda: dict(versions={}))


class Cells:
    "16 numbers as 4 x 4 grey cells of a 16 px picture, and a grain from the picture's own stream. Every operation is one pixel's: no batch changes a bit."
    rowwise, image_size, dim, slips, calls = True, 16, 16, (), 0

    def generate(self, embeddings, *, n_per_identity=1, attributes=None, generator=None):
        self.calls += 1
        e = torch.as_tensor(np.asarray(embeddings)).reshape(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        grain = torch.stack([torch.rand(3, 16, 16, generator=g) for g in generator])
        return (e + .04 * (grain - .5)).clamp(-1, 1)


class Slow(Cells):
    def generate(self, *a, **k):
        time.sleep(.04)
        return super().generate(*a, **k)


class Single(Cells):
    "Takes one generator only."
    rowwise = False

    def generate(self, embeddings, *, n_per_identity=1, attributes=None, generator=None):
        assert len(embeddings) == 1
        return super().generate(embeddings, generator=[generator])


class Slips(Cells):
    "Shows the negative of the vector where the first number of the stream is small."
    share = .2

    def generate(self, embeddings, *, n_per_identity=1, attributes=None, generator=None):
        wrong = np.array([float(torch.rand([], generator=g)) < self.share for g in generator])
        return super().generate(np.where(wrong[:, None], -1, 1) * np.asarray(embeddings), generator=generator)


class Reads:
    "Reads the 16 numbers back."
    dim, key = 16, "reads"

    def embed(self, x):
        x = np.asarray(x, np.float32).reshape(len(x), 3, 4, 4, 4, 4).mean((1, 3, 5)).reshape(len(x), 16) / 127.5 - 1
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


PLAN = SamplingPlan(n=7, dim=16, max_cosine=.6, per_identity=3, length=60.)


def pictures(folder):
    "What can be seen in a folder of folders; it may be at work."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for inner in sorted(Path(folder).glob("[!.]*")) if inner.is_dir() for p in sorted(inner.iterdir()) if p.suffix in (".jpg", ".png")}


def contents(folder):
    "All that a data set says, without times."
    about = read_json(folder / "dataset.json")
    about.pop("provenance")
    return pictures(folder), Records.load(folder).table.to_csv(), pd.read_parquet(folder / "dropped.parquet").to_csv(), pd.read_parquet(folder / "files.parquet").to_csv(), about


def twins(planted=((5, 2), (6, 2))):
    x = make_identities(PLAN).vectors.copy()
    for later, first in planted:
        x[later] = x[first]
    return x


# ---------------------------------------------------------------- the set itself

def test_a_set_is_what_the_plan_says(tmp_path):
    done = generate_dataset(Cells(), PLAN, tmp_path / "set", shard=6, format="png")
    people, who, number = make_identities(PLAN), np.repeat(np.arange(7), 3), np.tile(np.arange(3), 7)
    planned = plan_pictures(PLAN, people, who, number)
    records = done.records
    assert records.table["image"].tolist() == [f"{j:06d}/{i:04d}.png" for j, i in zip(who, number)] and records.identities.tolist() == who.tolist()
    assert np.allclose(records.table["angle_deg"], planned.table["angle_deg"])
    streams = [torch_rng(PLAN.seed, "picture", j, i, 0, 0) for j, i in zip(who, number)]
    expected = np.clip(np.round((Cells().generate(planned.vectors, generator=streams).numpy() + 1) * 127.5), 0, 255).astype(np.uint8)
    for k in range(21):
        assert (records.pixels(k) == expected[k].transpose(1, 2, 0)).all()
    assert check_dataset(done.out) == {} and not (done.out / ".generate").exists() and done.made == 21
    assert SamplingPlan.load(done.out / "plan.yaml") == PLAN and (IdentitySet.load(done.out / "identities.npz").vectors == people.vectors).all()
    assert len(done.dropped) == 0 and "21 pictures of 7 identities" in repr(done)


def test_a_picture_is_the_same_in_any_set(tmp_path):
    big = generate_dataset(Cells(), dataclasses.replace(PLAN, keep_apart=False, n=9, per_identity=5), tmp_path / "big", shard=4, batch=3)
    small = generate_dataset(Single(), dataclasses.replace(PLAN, keep_apart=False, n=4, per_identity=2), tmp_path / "small")
    mine, theirs = pictures(small.out), pictures(big.out)
    assert len(mine) == 8 and all(theirs[k] == v for k, v in mine.items())
    other = pictures(generate_dataset(Cells(), dataclasses.replace(PLAN, keep_apart=False, n=4, per_identity=2, seed=1), tmp_path / "other").out)
    assert all(other[k] != v for k, v in mine.items()) and len(set(theirs.values())) == 45


def test_a_finished_set_is_not_made_again(tmp_path):
    generate_dataset(Cells(), PLAN, tmp_path / "set")
    before = contents(tmp_path / "set")
    lazy = Cells()
    again = generate_dataset(lazy, PLAN, tmp_path / "set")
    assert again.finished and again.made == 0 and lazy.calls == 0 and contents(tmp_path / "set") == before and "nothing to do" in repr(again)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
def test_ranks_make_what_one_makes(order, tmp_path):
    one = generate_dataset(Slips(), PLAN, tmp_path / "one", shard=3, embedder=Reads(), redraws=1, people=twins())
    results = [generate_dataset(Slips(), PLAN, tmp_path / "many", shard=3, embedder=Reads(), redraws=1, people=twins(), rank=r, world=len(order)) for r in order]
    assert [r.finished for r in results] == [False] * (len(order) - 1) + [True]
    assert sum(r.made for r in results) == 21 and contents(tmp_path / "many") == contents(one.out)


def test_rank_and_world_from_the_environment(tmp_path, monkeypatch):
    for r in "01":
        monkeypatch.setenv("RANK", r), monkeypatch.setenv("WORLD_SIZE", "2")
        last = generate_dataset(Cells(), PLAN, tmp_path / "set", shard=3)
    assert last.finished and 0 < last.made < 21


def test_processes_make_what_one_makes(tmp_path):
    one = generate_dataset(RenderedFaces(16), SamplingPlan(n=4, dim=16, per_identity=2, max_cosine=.6), tmp_path / "one", shard=2)
    two = generate_dataset(RenderedFaces(16), SamplingPlan(n=4, dim=16, per_identity=2, max_cosine=.6), tmp_path / "two", shard=2, processes=2)
    assert two.made == 8 and pictures(one.out) == pictures(two.out)


# ---------------------------------------------------------------- stopped at any point

SCRIPT = """
import os, sys; sys.path.insert(0, {tests!r})
os.sync = lambda: None
from test_generate import Slow, generate_dataset, SamplingPlan
generate_dataset(Slow(), SamplingPlan(n=60, dim=16, max_cosine=.7, per_identity=5), sys.argv[1], shard=10)
"""


def test_killed_and_continued(tmp_path):
    plan = SamplingPlan(n=60, dim=16, max_cosine=.7, per_identity=5)
    (tmp_path / "go.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    out, seen = tmp_path / "set", []
    for k in range(3):
        process = subprocess.Popen([sys.executable, "go.py", "set"], cwd=tmp_path, env={**os.environ, "HYPERFACE_PROGRESS": "0"})
        before, limit = len(pictures(out)), time.time() + 120
        while process.poll() is None and len(pictures(out)) < before + 13 + 7 * k and time.time() < limit:
            time.sleep(.003 * (k + 1))
        process.kill()
        assert process.wait() == -9                                            # it was still at work
        seen.append(len(pictures(out)))
        for content in pictures(out).values():
            assert decode_image(content).shape == (16, 16, 3)                  # whatever can be seen is whole
    assert 0 < seen[0] < seen[1] < seen[2] < 300 and not (out / "dataset.json").exists()
    with pytest.raises(DataError, match="no finished data set"):
        check_dataset(out)
    done = generate_dataset(Slow(), plan, out, shard=10)
    assert done.made < 300 and done.about["counts"]["pictures"] == 300 and check_dataset(out) == {}
    generate_dataset(Cells(), plan, tmp_path / "peace", shard=10)
    assert pictures(out) == pictures(tmp_path / "peace")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("policy, step", [("merge", 1), ("redraw", 2), ("drop", 5)])
def test_stopped_before_any_rename(policy, step, tmp_path, monkeypatch):
    "Every step that changes a name is a place to die at; after each, the same call gives the same set."
    options = dict(shard=9, embedder=Reads(), redraws=1, people=twins(), twins=policy, format="png")
    calls = dict(n=0, stop=None)

    def counted(real):
        def rename(*a, **k):
            calls["n"] += 1
            if calls["n"] == calls["stop"]:
                raise Killed
            return real(*a, **k)
        return rename

    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    peace = contents(generate_dataset(Slips(), PLAN, tmp_path / "peace", **options).out)
    total = calls["n"]
    assert total > 20
    for stop in range(step, total + 1, step):
        out = tmp_path / "stopped"
        calls.update(n=0, stop=stop)
        with pytest.raises(Killed):
            generate_dataset(Slips(), PLAN, out, **options)
        calls.update(stop=None)
        assert not (out / "dataset.json").exists()
        generate_dataset(Slips(), PLAN, out, **options)
        assert contents(out) == peace, stop
        assert check_dataset(out) == {} and not (out / ".generate").exists()
        import shutil
        shutil.rmtree(out)


def test_damage_to_an_unfinished_set_is_made_good(tmp_path):
    class Ends(Cells):
        def generate(self, *a, **k):
            if self.calls >= 5:
                raise Killed
            return super().generate(*a, **k)

    out = tmp_path / "set"
    with pytest.raises(Killed):
        generate_dataset(Ends(), PLAN, out, shard=3, people=twins(()), format="png")
    done = sorted(p.name for p in (out / ".generate" / "done").iterdir())
    assert len(done) >= 4
    first = out / "000000/0001.png"
    first.write_bytes(first.read_bytes()[:40])                                 # torn
    (out / "000001/0002.png").unlink()                                         # missing
    (out / ".generate/done/000002/pictures.parquet").write_bytes(b"PAR1")      # its list is torn
    (out / ".generate/000006.123.part").mkdir()                                # what a killed process left
    generate_dataset(Ends(), PLAN, tmp_path / "dummy", shard=30, people=twins(()), format="png")  # the same weights: the class's name counts
    Ends.generate = Cells.generate
    generate_dataset(Ends(), PLAN, out, shard=3, people=twins(()), format="png")
    assert check_dataset(out) == {} and pictures(out) == pictures(tmp_path / "dummy")


def test_a_shard_that_somebody_holds_is_waited_for(tmp_path):
    out = tmp_path / "set"
    code = ("import fcntl, sys, time\nf = open(sys.argv[1], 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 2)\nprint('held', flush=True); time.sleep(60)")
    (out / ".generate").mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", code, str(out / ".generate/lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    import threading
    result = {}
    thread = threading.Thread(target=lambda: result.update(done=generate_dataset(Cells(), PLAN, out, shard=3)))
    thread.start()
    limit = time.time() + 60
    while len(list((out / ".generate").glob("done/*"))) < 6 and time.time() < limit:
        time.sleep(.05)
    time.sleep(.3)
    assert thread.is_alive() and not (out / "000002").exists()                 # all but the one that is held
    holder.kill(), holder.wait()
    thread.join(60)
    assert result["done"].finished and check_dataset(out) == {}


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    real, count = module.encode_image, dict(n=0)

    def full(*a):
        count["n"] += 1
        if count["n"] > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*a)

    monkeypatch.setattr(module, "encode_image", full)
    with pytest.raises(DataError, match="disk is full.*goes on"):
        generate_dataset(Cells(), PLAN, tmp_path / "set", shard=3)
    assert len(pictures(tmp_path / "set")) == 9 and not list((tmp_path / "set" / ".generate").glob("*.part"))
    monkeypatch.setattr(module, "encode_image", real)
    done = generate_dataset(Cells(), PLAN, tmp_path / "set", shard=3)
    assert done.made == 12 and check_dataset(done.out) == {}


# ---------------------------------------------------------------- filters

def slipped(redraw):
    return {(j, i) for j in range(7) for i in range(3) if all(float(torch.rand([], generator=torch_rng(0, "picture", j, i, a, 0))) < Slips.share for a in range(redraw + 1))}


@pytest.mark.parametrize("compare", ["asked", "mean"])
def test_outliers_are_found_and_listed(compare, tmp_path):
    planted = slipped(0)
    assert 2 <= len(planted) <= 8
    if compare == "mean":                                                      # a mean needs a majority that is right
        planted = {p for p in planted if sum(q[0] == p[0] for q in planted) == 1}
    done = generate_dataset(Slips(), PLAN, tmp_path / "set", embedder=Reads(), redraws=0, compare=compare, twins="keep")
    found = {(r.identity, r.draw): r for r in done.dropped.itertuples()}
    assert planted <= set(found) and (compare == "mean" or planted == set(found))
    assert all(r.cosine < .3 and "outlier" in r.reason for r in found.values())
    assert set(zip(done.records.table["identity"], done.records.table["draw"])) == {(j, i) for j in range(7) for i in range(3)} - set(found)
    assert done.records.table["cosine"].min() > .3 and done.about["counts"]["dropped"] == len(found) and check_dataset(done.out) == {}


def test_outliers_are_drawn_again(tmp_path):
    done = generate_dataset(Slips(), PLAN, tmp_path / "set", embedder=Reads(), redraws=2, twins="keep")
    table = done.records.table
    assert set(zip(table["identity"][table["attempt"] > 0], table["draw"][table["attempt"] > 0])) == slipped(0) - slipped(2)
    assert {(r.identity, r.draw) for r in done.dropped.itertuples()} == slipped(2) and table["cosine"].min() > .3
    assert done.about["counts"]["redrawn"] == len(slipped(0) - slipped(2))


def test_everybody_an_outlier(tmp_path):
    class Always(Slips):
        share = 2.
    done = generate_dataset(Always(), PLAN, tmp_path / "set", embedder=Reads(), redraws=1)
    assert done.about["counts"] == dict(identities=0, pictures=0, asked=21, redrawn=0, dropped=21, merged=0, redrawn_identities=0, dropped_identities=0)
    assert len(Records.load(done.out)) == 0 and check_dataset(done.out) == {}


def test_twins_are_merged(tmp_path):
    done = generate_dataset(Cells(), PLAN, tmp_path / "set", embedder=Reads(), people=twins())
    table = done.records.table
    assert table.groupby("identity")["made_for"].unique().map(sorted).to_dict() == {0: [0], 1: [1], 2: [2, 5, 6], 3: [3], 4: [4]}
    assert len(table) == 21 and (table["image"].str.split("/").str[0].astype(int) == table["identity"]).all() and done.about["counts"]["merged"] == 2
    plain = pictures(generate_dataset(Cells(), PLAN, tmp_path / "plain", people=twins()).out)
    for row in table.itertuples():
        assert (done.out / row.image).read_bytes() == plain[f"{row.made_for:06d}/{row.draw:04d}.jpg"]
    assert check_dataset(done.out) == {}


def test_twins_are_dropped_or_kept(tmp_path):
    drop = generate_dataset(Cells(), PLAN, tmp_path / "drop", embedder=Reads(), people=twins(), twins="drop")
    assert sorted(drop.records.table["identity"].unique()) == [0, 1, 2, 3, 4] and not (drop.out / "000005").exists()
    assert drop.dropped["identity"].tolist() == [5] * 3 + [6] * 3 and drop.dropped["reason"].str.contains("identity 2 again: cosine").all()
    keep = generate_dataset(Cells(), PLAN, tmp_path / "keep", embedder=Reads(), people=twins(), twins="keep")
    assert len(keep.records) == 21 and len(keep.dropped) == 0


def test_twins_are_drawn_again(tmp_path):
    done = generate_dataset(Cells(), PLAN, tmp_path / "set", embedder=Reads(), people=twins(), twins="redraw", shard=3)
    people, before = IdentitySet.load(done.out / "identities.npz"), twins()
    assert np.flatnonzero((people.vectors != before).any(1)).tolist() == [5, 6] and done.about["counts"]["redrawn_identities"] == 2
    x, who = Reads().embed(np.stack([done.records.pixels(i) for i in range(21)]).transpose(0, 3, 1, 2)), done.records.identities
    means = np.stack([x[who == j].mean(0) for j in range(7)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert (means @ means.T - np.eye(7)).max() < .7 and (np.einsum("jd,jd->j", means, people.vectors) > .9).all()
    assert len(done.records) == 21 and check_dataset(done.out) == {}
    again = generate_dataset(Cells(), PLAN, tmp_path / "set", embedder=Reads(), people=twins(), twins="redraw", shard=3)
    assert again.made == 0


def test_damage_after_a_round_of_redrawing(tmp_path, monkeypatch):
    "A shard of the first pass is found torn when twins were drawn again already: all that stands on it is made anew."
    options = dict(embedder=Reads(), people=twins(), twins="redraw", shard=6, format="png")
    peace = contents(generate_dataset(Cells(), PLAN, tmp_path / "peace", **options).out)
    out = tmp_path / "set"

    def stop(job, redrawn):
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(module, "decide", stop)
        with pytest.raises(Killed):
            generate_dataset(Cells(), PLAN, out, **options)
    assert list((out / ".generate").glob("round-1.json"))
    (out / "000004/0002.png").unlink()                                         # shares its shard with identity 5, which was drawn again
    generate_dataset(Cells(), PLAN, out, **options)
    assert contents(out) == peace and check_dataset(out) == {}


def test_twins_that_stay_twins_are_dropped_in_the_end(tmp_path):
    class Alike(Cells):
        "Whoever is asked for beyond the first five, it is number 2."
        def generate(self, embeddings, *, generator=None, **k):
            known = make_identities(PLAN).vectors
            e = np.asarray(embeddings)
            return super().generate(np.where(((e @ known[:5].T).max(1) > .9)[:, None], e, known[2]), generator=generator)
    plan = dataclasses.replace(PLAN, draws="none")
    done = generate_dataset(Alike(), plan, tmp_path / "set", embedder=Reads(), compare="mean", twins="redraw", rounds=2)
    assert sorted(done.records.table["identity"].unique()) == [0, 1, 2, 3, 4] and done.dropped["reason"].str.contains("after 2 rounds").all() and len(done.dropped) == 6
    assert done.about["counts"]["redrawn_identities"] == 4 and done.about["counts"]["dropped_identities"] == 2 and check_dataset(done.out) == {}


# ---------------------------------------------------------------- attributes and steering

def test_attributes_reach_the_generator_and_the_table(tmp_path):
    class Turns(Cells):
        attribute_names = ["yaw"]

        def generate(self, embeddings, *, attributes=None, generator=None, **k):
            assert list(attributes) == ["yaw"]
            return super().generate(np.full((len(embeddings), 16), attributes["yaw"].to_numpy()[:, None] / 90, np.float32), generator=generator)
    plan = dataclasses.replace(PLAN, attributes=(Target("yaw", low=-80, high=80),))
    done = generate_dataset(Turns(), plan, tmp_path / "set", batch=4, format="png")
    seen = np.array([done.records.pixels(i).mean() for i in range(21)])
    assert np.abs((seen / 127.5 - 1) * 90 - done.records.table["yaw"]).max() < 2
    with pytest.raises(ConfigError, match="does not act on attribute yaw"):
        generate_dataset(Cells(), plan, tmp_path / "other")


def test_steering_moves_vectors_row_by_row(tmp_path):
    def flip(vectors, table):
        assert len(vectors) == len(table) and {"identity", "draw", "yaw"} <= set(table)
        return np.where(table["yaw"].to_numpy()[:, None] > 0, -vectors, vectors)
    plan = dataclasses.replace(PLAN, attributes=(Target("yaw", low=-1, high=1),))
    done = generate_dataset(Cells(), plan, tmp_path / "set", steer=flip, shard=6, batch=4)
    people = make_identities(plan)
    x = Reads().embed(np.stack([done.records.pixels(i) for i in range(21)]).transpose(0, 3, 1, 2))
    cosine = np.einsum("nd,nd->n", x, people.vectors[done.records.identities])
    assert ((cosine < 0) == (done.records.table["yaw"] > 0)).all() and read_json(done.out / "dataset.json")["identity"]["steer"] == "flip"


# ---------------------------------------------------------------- containers, provenance

def test_containers_on_request(tmp_path):
    out = generate_dataset(Cells(), PLAN, tmp_path / "set", formats=("rec", "zip"), shard=6).out
    generate_dataset(Cells(), PLAN, out, formats=("rec", "lmdb"), shard=6)      # a finished set is given what is missing
    mine = pictures(out)
    for found in (read_rec(out / "containers/rec/train.rec"), read_zip(out / "containers/faces.zip"), read_lmdb(out / "containers/lmdb")):
        assert len(found) == 21 and np.bincount(found.identities.astype(int)).tolist() == [3] * 7
        assert sorted(found.source.encoded(i) for i in range(21)) == sorted(mine.values())
    stamp = (out / "containers/rec/train.rec").stat().st_mtime_ns
    write_containers(out, ("rec",))
    assert (out / "containers/rec/train.rec").stat().st_mtime_ns == stamp and check_dataset(out) == {}
    (out / "containers/.lmdb.done").unlink()                                   # it was being written when the machine went down
    write_containers(out, ("lmdb",))
    assert len(read_lmdb(out / "containers/lmdb")) == 21


def test_webdataset_on_request(tmp_path):
    pytest.importorskip("hyperface.data.webdataset")
    pytest.importorskip("webdataset")
    out = generate_dataset(Cells(), PLAN, tmp_path / "set", formats=("webdataset",)).out
    import tarfile
    names = [n for p in sorted((out / "containers/webdataset").glob("*.tar")) for n in tarfile.open(p).getnames()]
    assert sum(n.endswith(".jpg") for n in names) == 21


def test_provenance(tmp_path, monkeypatch):
    monkeypatch.undo()
    out = generate_dataset(Cells(), PLAN, tmp_path / "set").out
    about = json.loads((out / "dataset.json").read_text())
    assert about["format"] == "hyperface-dataset" and about["counts"]["pictures"] == 21 and about["identity"]["plan"]["seed"] == 0
    assert about["identity"]["weights"] == weights_key(Cells()) and about["identity"]["people"] == make_identities(PLAN).key
    assert about["provenance"]["versions"]["torch"] == torch.__version__ and {"commit", "time"} <= set(about["provenance"])


def test_the_weights_hash_sees_every_weight():
    class Net:
        def __init__(self, value=1., mode="a"):
            self.G, self.mode, self.batch = torch.nn.Linear(2, 2), mode, 3
            torch.nn.init.constant_(self.G.weight, value), torch.nn.init.zeros_(self.G.bias)
    a = Net()
    assert weights_key(a) == weights_key(Net()) and len({weights_key(x) for x in (a, Net(1.0001), Net(mode="b"))}) == 3
    with torch.no_grad():
        a.G.bias[1] = 1e-30
    assert weights_key(a) != weights_key(Net())
    assert len({RenderedFaces(16).key, RenderedFaces(32).key, RenderedFaces(16, .5).key}) == 3


def test_check_sees_every_fault(tmp_path):
    out = generate_dataset(Cells(), PLAN, tmp_path / "set").out
    a, b, c = (out / f"00000{k}/0001.jpg" for k in range(3))
    a.write_bytes(a.read_bytes()[:-3])
    content = bytearray(b.read_bytes())
    content[-10] ^= 1
    b.write_bytes(content)
    c.unlink()
    (out / "000004/extra.jpg").write_bytes(b"x")
    assert sorted(check_dataset(out)) == ["000000/0001.jpg", "000001/0001.jpg", "000002/0001.jpg", "000004/extra.jpg"]


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("change, said", [(dict(plan=dataclasses.replace(PLAN, seed=3)), "plan.seed is 0 there and 3 here"), (dict(quality=80), "recipe.quality"), (dict(people=twins()), "people"), (dict(generator=Single()), "generator is 'Cells' there")])
@pytest.mark.parametrize("finished", [True, False])
def test_another_data_sets_folder(change, said, finished, tmp_path):
    out, arguments = tmp_path / "set", dict(generator=Cells(), plan=PLAN)
    if finished:
        generate_dataset(Cells(), PLAN, out, shard=3)
    else:
        generate_dataset(Cells(), PLAN, out, shard=3, rank=0, world=2)
    before = pictures(out)
    arguments |= change
    with pytest.raises(DataError, match=said):
        generate_dataset(arguments.pop("generator"), arguments.pop("plan"), out, **{"shard": 3, **arguments})
    assert pictures(out) == before
    assert generate_dataset(Cells(), PLAN, out, shard=3).finished              # and the refusal did no harm


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.jpg").write_bytes(b"beach")
    with pytest.raises(DataError, match="not made by this command.*holiday"):
        generate_dataset(Cells(), PLAN, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["holiday.jpg"]
    with pytest.raises(ConfigError, match="cannot be written"):
        generate_dataset(Cells(), PLAN, tmp_path / "mine/holiday.jpg")


class Wrong(Cells):
    def __init__(self, make):
        self.make = make
    def generate(self, embeddings, **k):
        return self.make(len(embeddings))


@pytest.mark.parametrize("arguments, said", [
    (dict(people=np.full((3, 16), np.nan)), "not finite"), (dict(people=np.zeros((0, 16))), "no identities"), (dict(people=np.zeros((2, 16))), "all zeros"), (dict(people=np.eye(4)), "16 dimensions"),
    (dict(formats=("tar",)), "no such container"), (dict(rank=2, world=2), "rank"), (dict(quality=0), "quality"), (dict(qualty=90), "qualty"), (dict(format="gif"), "format must be one of"), (dict(shard=0), "shard"),
    (dict(embedder=type("E", (), dict(dim=8, embed=None))()), "not those the generator was asked for"), (dict(embedder=Reads(), twins="redraw", plan=dataclasses.replace(PLAN, identities="packed", packing="code")), "Only drawn"),
    (dict(generator=Wrong(lambda n: torch.full((n, 3, 16, 16), float("nan")))), "of identity 0.*finite"), (dict(generator=Wrong(lambda n: torch.zeros(n + 1, 3, 16, 16))), "for 21 vectors"), (dict(generator=Wrong(lambda n: torch.zeros(n, 16, 16, 5))), "images must be")])
def test_what_cannot_be_done(arguments, said, tmp_path):
    arguments = {"generator": Cells(), "plan": PLAN, **arguments}
    with pytest.raises((ConfigError, DataError), match=said):
        generate_dataset(arguments.pop("generator"), arguments.pop("plan"), tmp_path / "set", **arguments)
    assert pictures(tmp_path / "set") == {} and not (tmp_path / "set/dataset.json").exists()


def test_generators_by_name(tmp_path):
    faces = load_generator_by_name("rendered", size=32, nuisance=.5)
    assert (faces.image_size, faces.nuisance) == (32, .5)
    for arguments, error, said in ((("dcface",), ConfigError, "One of rendered"), (("rendered", "weights"), ConfigError, "no weights"),
                                   (("stylegan2", str(tmp_path)), MissingWeights, "no generator"), (("arc2face",), MissingWeights, "do not ship")):
        with pytest.raises(error, match=said):
            load_generator_by_name(*arguments)


def test_shipped_stylegan2_paints_a_packing(tmp_path):
    "It knows no identities: the vector decides z and what is not asked for; pictures of one vector's neighbourhood are one person's."
    from hyperface.vec2face.train import vec2face_embedder
    plan = SamplingPlan(identities="gaussian", n=4, dim=512, per_identity=5, seed=3)
    faces = load_generator_by_name("stylegan2")
    assert faces.dim is None and not faces.faithful and set(faces.attribute_names) >= {"age", "gender", "ethnicity"}
    folder = tmp_path / "set"
    generate_dataset(faces, plan, folder, embedder=vec2face_embedder("rendered64"), redraws=0, twins="keep", outlier=-1.)
    from hyperface.data.formats import read_dataset
    records = read_dataset(folder)
    assert len(records) == 20 and len(np.unique(records.codes)) == 4
    v = np.asarray(vec2face_embedder("rendered64").embed(records.images()))
    s, same = v @ v.T, records.codes[:, None] == records.codes
    assert s[same & ~np.eye(20, dtype=bool)].mean() > s[~same].mean() + .3
    vectors = make_identities(plan).vectors
    one = faces.generate(vectors[1:2], generator=[torch_rng(0, "a")])
    assert np.allclose(one, faces.generate(vectors[:2], generator=[torch_rng(0, "b"), torch_rng(0, "a")])[1:], atol=1e-4)   # in company as alone


# ---------------------------------------------------------------- generators that take a list of streams

def alone_and_together(faces, vectors, tolerance):
    streams = lambda rows: [torch_rng(1, "picture", int(k)) for k in rows]
    whole = call_generator(faces, vectors, streams(range(len(vectors))))
    for rows in ([3], [4, 1], [2, 0, 3]):
        assert np.abs(call_generator(faces, vectors[rows], streams(rows)).astype(int) - whole[rows]).max() <= tolerance
    assert np.abs(call_generator(faces, vectors[[0, 0]], streams([0, 1])).astype(int)).std() > 0
    same, other = call_generator(faces, vectors[:1], streams([0])), call_generator(faces, vectors[:1], streams([9]))
    assert np.abs(same.astype(int) - other).max() > 1                          # the stream is used
    return whole


def test_vec2face_draws_masks_for_each_picture():
    from hyperface.vec2face.networks import GENERATION, FeatureMAE, draw_masks, fmae_config
    from hyperface.vec2face.train import Vec2FaceFaces
    torch.manual_seed(0)
    model = FeatureMAE(fmae_config("tiny", feature_dim=16, multipliers=(1, 2))).eval()
    for p in model.im_decoder.conv_out.parameters():
        torch.nn.init.normal_(p, std=.2)
    faces = Vec2FaceFaces(model, batch=2)
    assert faces.rowwise and expected_dim(faces) == 16
    alone_and_together(faces, make_identities(SamplingPlan(n=5, dim=16, max_cosine=.9)).vectors, 1)
    drop, hidden = draw_masks(400, GENERATION, generator=[torch_rng(0, k) for k in range(400)])
    assert (drop.sum(1) == 5).all() and (drop <= hidden).all() and hidden.sum(1).float().std() > 3   # each its own share
    one = torch_rng(0, "one")
    assert abs(float(hidden.float().mean()) - np.mean([float(draw_masks(1, GENERATION, generator=one)[1].float().mean()) for _ in range(400)])) < .03
    with pytest.raises(DataError, match="3 samples need as many generators"):
        draw_masks(3, GENERATION, generator=[one])


def test_stylegan2_draws_vectors_and_noise_for_each_picture():
    from hyperface.stylegan2.conditions import ConditionSchema, Identity
    from hyperface.stylegan2.networks import Generator
    from hyperface.stylegan2.sample import StyleGAN2Faces
    torch.manual_seed(0)
    G = Generator(8, 16, 16, 16, 3, dict(num_layers=2), dict(channel_base=256, channel_max=16)).eval()
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(p, .5)
    faces = StyleGAN2Faces((G, ConditionSchema([Identity(dim=16)])), batch=2)
    assert faces.rowwise and expected_dim(faces) == 16 and faces.attribute_names == []
    alone_and_together(faces, make_identities(SamplingPlan(n=5, dim=16, max_cosine=.9)).vectors, 1)


def test_rendered_people_follow_their_vectors():
    x = make_identities(SamplingPlan(n=300, dim=64, max_cosine=1.)).vectors
    people = rendered_person(x)
    assert abs(people.vector.std() - .97) < .03 and people.table["ethnicity"].value_counts().min() > 30 and abs((people.table["gender"] == "male").mean() - .5) < .1 and people.table["age"].between(18, 75).all()
    near = rendered_person((x + .01 * np.roll(x, 1, 0)) / np.linalg.norm(x + .01 * np.roll(x, 1, 0), axis=1, keepdims=True))
    assert np.abs(near.vector - people.vector).max() < .08 < np.abs(rendered_person(np.roll(x, 1, 0)).vector - people.vector).mean()
    assert (rendered_person(x[[5]]).vector == people.vector[[5]]).all() or np.allclose(rendered_person(x[[5]]).vector, people.vector[[5]], atol=1e-6)
    faces = RenderedFaces(32)
    alone_and_together(faces, x[:5], 0)
    old = faces.generate(x[:2], n_per_identity=2, attributes=dict(yaw=[0., 40.], age=[70., 20.]), generator=torch_rng(0, "n"))
    assert old.shape == (4, 3, 32, 32) and float(old.abs().max()) <= 1

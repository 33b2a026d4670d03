"""Identity vectors, draws and attribute targets behind one plan."""
import dataclasses
import math

import numpy as np
import pytest

from hyperface.config import from_dict
from hyperface.core import ConfigError, DataError, MissingWeights, write_npz
from hyperface.extraction.embed import Embeddings
from hyperface.identities import (IdentitySet, SamplingPlan, Target, gallery_shape, identity_set, make_identities, place_apart, plan_of_file, plan_pictures,
                                  redraw_identities, strengths)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def degrees_between(a, b):
    return np.degrees(2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1)))


def grid(c, k):
    return np.repeat(np.arange(c), k), np.tile(np.arange(k), c)


PLANS = {"gaussian": SamplingPlan(), "everything": SamplingPlan("pca", 7, 32, 3, "refs.npz", .25, 9, 5, "row", "code", 4, 11, "interval", (.1,), (1.,), 3., 12., .4, False, .25,
         (Target("yaw", "normal", -60, 60, 5, 20), Target("age", "choice", values=(20, 30), shares=(1, 3), per="identity"), Target("expression", "choice", words=("happy", "sad"))))}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_plan_round_trip(name, suffix, tmp_path):
    plan = PLANS[name]
    assert SamplingPlan.load(plan.save(tmp_path / f"plan{suffix}")) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 1


@pytest.mark.parametrize("wrong, said", [
    (dict(identities="guess"), "identities must be one of"), (dict(n=0), "n must be at least 1"), (dict(n=2.5), "n must be int"), (dict(dim=1), "dim"), (dict(max_cosine=float("nan")), "max_cosine"),
    (dict(tries=0), "tries"), (dict(shares=(.4, .4)), "shares"), (dict(shares=(.5, .4, .2)), "shares"), (dict(scales=(-.1, .5, .7)), "scales"), (dict(draws="vmf", angle_deg=90), "angle_deg"),
    (dict(share=.6), "share"), (dict(per_identity=0), "per_identity"), (dict(length=0), "length"), (dict(attributes=({"name": "yaw"},)), "attributes"),
    (dict(attributes=(Target("yaw"), Target("yaw", low=-1))), "different names")])
def test_plans_that_make_no_sense(wrong, said):
    with pytest.raises(ConfigError, match=said):
        SamplingPlan(**wrong)


@pytest.mark.parametrize("wrong, said", [(dict(name="identity"), "plain name"), (dict(name="../x"), "plain name"), (dict(name="a", low=2, high=1), "above high"), (dict(name="a", law="choice"), "choices"),
                                         (dict(name="a", law="choice", words=("x",), values=(1.,)), "choices"), (dict(name="a", law="choice", words=("x", "y"), shares=(1,)), "one number"), (dict(name="a", std=0), "std")])
def test_targets_that_make_no_sense(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Target(**wrong)


def test_a_misspelt_field_is_named():
    with pytest.raises(ConfigError, match="per_identity"):
        from_dict(SamplingPlan, {"per_identiy": 3})


def test_rejection_keeps_the_threshold_and_the_beginning():
    plan = SamplingPlan(n=60, dim=8, max_cosine=.75, tries=200)
    people = make_identities(plan)
    cosine = people.vectors @ people.vectors.T - 2 * np.eye(60)
    assert cosine.max() <= .75 + 1e-6 and people.about["rejected"] > 20
    assert (make_identities(dataclasses.replace(plan, n=25)).vectors == people.vectors[:25]).all()
    assert (make_identities(dataclasses.replace(plan, seed=1)).vectors != people.vectors).all(1).all()
    free = make_identities(dataclasses.replace(plan, max_cosine=1.))
    assert (free.vectors @ free.vectors.T - 2 * np.eye(60)).max() > .75 and free.about["rejected"] == 0


def test_rejection_looks_across_blocks():
    same = np.eye(5)[0]
    draw = lambda j, a: same if a == 0 and j in (0, 7) else unit(np.random.default_rng([j, a]).standard_normal((1, 5)))[0]
    placed, rejected = place_apart(draw, 8, .9, 100, block=2)
    assert (placed @ placed.T - 2 * np.eye(8)).max() <= .9 + 1e-6 and rejected >= 1


@pytest.mark.parametrize("tries", [1, 30])
def test_a_threshold_that_cannot_be_met_ends_and_counts(tries):
    with pytest.raises(ConfigError, match=rf"(\d+) of 500 identities were placed.*{tries} candidates.*packed") as e:
        make_identities(SamplingPlan(n=500, dim=3, max_cosine=.5, tries=tries))
    placed = int(str(e.value).split()[0])
    assert 1 <= placed <= 12                                                 # at 60 degrees at most 12 fit round a point
    assert len(make_identities(SamplingPlan(n=placed, dim=3, max_cosine=.5, tries=tries))) == placed


def test_pca_has_the_gallerys_mean_and_covariance():
    r = np.random.default_rng(0)
    gallery = unit(r.standard_normal((4000, 12)) * np.linspace(.3, .05, 12) + .6)
    mean, directions = gallery_shape(gallery, 5)
    assert np.allclose(mean, gallery.mean(0)) and directions.shape == (5, 12)
    values, vectors = np.linalg.eigh(np.cov(gallery.T))
    assert np.allclose(directions.T @ directions, vectors[:, -5:] * values[-5:] @ vectors[:, -5:].T, atol=1e-9)
    people = make_identities(SamplingPlan(identities="pca", n=1500, max_cosine=1., draws="none"), gallery)
    assert people.dim == 12 and np.allclose(unit(people.vectors.mean(0, keepdims=True)), unit(gallery.mean(0, keepdims=True)), atol=.01)
    assert np.allclose(np.cov(people.vectors.T), np.cov(gallery.T), atol=.0025)
    with pytest.raises(DataError, match="same"):
        gallery_shape(np.ones((5, 4)))


def test_gallery_means_rows_and_files(tmp_path):
    r = np.random.default_rng(1)
    x = unit(r.standard_normal((9, 6))).astype(np.float32)
    who = np.array(["b", "a", "c"] * 3)
    refs = Embeddings(x, dict(identity=who))
    means = make_identities(SamplingPlan(identities="gallery", n=0), refs)
    assert means.names.tolist() == ["a", "b", "c"] and np.allclose(means.vectors[0], unit(x[who == "a"].mean(0, keepdims=True))[0], atol=1e-6)
    path = str(refs.save(tmp_path / "refs.npz"))
    assert (make_identities(SamplingPlan(identities="gallery", n=0, source=path)).vectors == means.vectors).all()
    assert (make_identities(plan_of_file(path, per_identity=3)).vectors == means.vectors).all() and plan_of_file(path, per_identity=3).per_identity == 3
    assert (make_identities(plan_of_file(path, each="row", n=5)).vectors == x[:5]).all()
    rows = make_identities(SamplingPlan(identities="gallery", n=4, each="row", source=path))
    assert (rows.vectors == x[:4]).all()
    write_npz(tmp_path / "plain.npz", vectors=3 * x)
    assert np.allclose(make_identities(SamplingPlan(identities="file", n=0, source=str(tmp_path / "plain.npz"))).vectors, x, atol=1e-6)
    from hyperface.sphere.packing import pack
    packed = pack(12, 8, method="code")
    packed.save(tmp_path / "packed.npz")
    assert (make_identities(SamplingPlan(identities="file", n=0, source=str(tmp_path / "packed.npz"))).vectors == packed.points).all()
    with pytest.raises(DataError, match="9 vectors for 10"):
        make_identities(SamplingPlan(identities="file", n=10, source=path))
    with pytest.raises(MissingWeights, match="nowhere.npz"):
        make_identities(SamplingPlan(identities="file", n=0, source="nowhere.npz"))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:60])
    with pytest.raises(DataError, match="broken.npz"):
        make_identities(SamplingPlan(identities="file", n=0, source=str(tmp_path / "broken.npz")))


@pytest.mark.parametrize("vectors, said", [(np.full((3, 4), np.nan), "not finite"), (np.zeros((2, 4)), "all zeros"), (np.zeros((0, 4)), "no identities"), (np.ones(4), "shape")])
def test_vectors_that_are_no_identities(vectors, said):
    with pytest.raises((DataError, ConfigError), match=said):
        identity_set(vectors, SamplingPlan())


def test_set_round_trip(tmp_path):
    people = make_identities(SamplingPlan(n=5, dim=16))
    again = IdentitySet.load(people.save(tmp_path / "x.npz"))
    assert (again.vectors == people.vectors).all() and (again.limit == people.limit).all() and again.names.tolist() == people.names.tolist() and again.about == people.about and again.key == people.key
    write_npz(tmp_path / "y.npz", other=np.ones(2))
    with pytest.raises(DataError, match="holds no identities"):
        IdentitySet.load(tmp_path / "y.npz")


DRAWS = [dict(draws="mixture"), dict(draws="angle", angle_deg=50.), dict(draws="interval", lowest_cosine=0.), dict(draws="vmf", angle_deg=40.)]


@pytest.mark.parametrize("draws", DRAWS, ids=lambda d: d["draws"])
def test_a_draw_never_comes_nearer_to_another_than_half_way(draws):
    plan = SamplingPlan(n=60, dim=10, max_cosine=.9, length=1.2, **draws)
    people = make_identities(plan)
    who, number = grid(60, 8)
    made = plan_pictures(plan, people, who, number)
    x, v = made.vectors.astype(float), people.vectors.astype(float)
    between = degrees_between(v[:, None], v[None])
    away = degrees_between(x[:, None], v[None])
    others = np.arange(60)[None] != who[:, None]
    assert (away >= between[who] / 2)[others].all()
    assert np.allclose(away[np.arange(len(x)), who], made.table.angle_deg, atol=1e-4)
    cut = np.isclose(made.table.angle_deg, np.degrees(people.limit)[who], atol=1e-6)
    assert cut.any() or draws["draws"] == "interval"
    free = plan_pictures(dataclasses.replace(plan, keep_apart=False), make_identities(dataclasses.replace(plan, keep_apart=False)), who, number)
    away = degrees_between(free.vectors.astype(float)[:, None], v[None])
    assert not (away >= between[who] / 2)[others].all()                       # without the limit they do


@pytest.mark.parametrize("draws", [*DRAWS, dict(draws="none")], ids=lambda d: d["draws"])
def test_a_picture_depends_on_seed_identity_and_number_alone(draws):
    plan = SamplingPlan(n=6, dim=24, per_identity=9, attributes=(Target("yaw", low=-30, high=30), Target("age", low=20, high=60, per="identity")), **draws)
    people = make_identities(plan)
    who, number = grid(6, 9)
    made = plan_pictures(plan, people, who, number)
    some = np.random.default_rng(0).permutation(54)[:20]
    part = plan_pictures(dataclasses.replace(plan, per_identity=100), people, who[some], number[some])
    assert (part.vectors == made.vectors[some]).all() and part.table.equals(made.table.iloc[some].reset_index(drop=True))
    other = plan_pictures(dataclasses.replace(plan, seed=5), people, who, number)
    again = plan_pictures(plan, people, who, number, attempt=1)
    if draws["draws"] != "none":
        assert len(np.unique(made.vectors, axis=0)) == 54
        for x in (other, again):
            assert (x.vectors != made.vectors).any(1).all()
    else:
        assert np.allclose(made.vectors, people.vectors[who], atol=1e-7)
    assert (again.table.yaw != made.table.yaw).all() and (again.table.age == made.table.age).all() and made.table.groupby("identity").age.nunique().eq(1).all() and made.table.age.nunique() == 6


def test_two_pictures_share_nothing_but_their_person():
    plan = SamplingPlan(n=3, dim=512, draws="angle", angle_deg=30., per_identity=60)
    x = plan_pictures(plan, make_identities(plan), *grid(3, 60)).vectors.astype(float)
    cosine = (x[:60] @ x[:60].T)[np.triu_indices(60, 1)]
    assert abs(cosine.mean() - math.cos(math.radians(30)) ** 2) < .004 and cosine.std() < .02


@pytest.mark.parametrize("k, expected", [(5, (2, 2, 1)), (10, (4, 4, 2)), (50, (20, 20, 10))])
def test_mixture_shares(k, expected):
    found = np.array(strengths((.3, .5, .7), (.4, .4, .2), k))
    assert tuple((found == s).sum() for s in (.3, .5, .7)) == expected
    assert strengths((.3, .5, .7), (.4, .4, .2), 500)[:k] == tuple(found)


def test_mixture_strengths_give_the_angles_of_the_noise():
    plan = SamplingPlan(n=40, keep_apart=False)
    people = make_identities(plan)
    angle = plan_pictures(plan, people, *grid(40, 50)).table.angle_deg.to_numpy().reshape(40, 50)
    eps = np.array(strengths(plan.scales, plan.shares, 50))
    for s in (.3, .5, .7):                                                    # v + eps N(0, I) with |v| = 21.9
        assert abs(np.cos(np.radians(angle[:, eps == s])).mean() - 1 / math.sqrt(1 + s**2 * 512 / 21.9**2)) < .004
    assert strengths(plan.scales, plan.shares, 50)[7] == strengths(plan.scales, plan.shares, 1 << 20)[7]


def test_attribute_laws():
    plan = SamplingPlan(n=1, dim=4, attributes=(Target("yaw", "normal", -20, 50, 10, 15), Target("pitch", low=-3, high=7), Target("expression", "choice", words=("happy", "sad"), shares=(1, 3)),
                                                Target("age", "choice", values=(20, 40, 60))))
    table = plan_pictures(plan, make_identities(plan), np.zeros(4000, int), np.arange(4000)).table
    from scipy.stats import kstest, truncnorm
    assert kstest(table.yaw, truncnorm((-20 - 10) / 15, (50 - 10) / 15, 10, 15).cdf).pvalue > .001 and kstest(table.pitch, "uniform", (-3, 10)).pvalue > .001
    assert abs((table.expression == "sad").mean() - .75) < .03 and set(table.age) == {20, 40, 60} and abs((table.age == 40).mean() - 1 / 3) < .03
    assert abs(np.corrcoef(table.yaw, table.pitch)[0, 1]) < .06


def test_redrawn_identities_are_new_and_apart():
    plan = SamplingPlan(n=30, dim=6, max_cosine=.8, tries=300)
    people = make_identities(plan)
    once, twice = (redraw_identities(plan, people, [4, 9], k) for k in (1, 2))
    for new in (once, twice):
        assert np.flatnonzero((new.vectors != people.vectors).any(1)).tolist() == [4, 9] and (new.vectors @ new.vectors.T - 2 * np.eye(30)).max() <= .8 + 1e-6 and new.about["redrawn"] == 2
    assert (once.vectors[4] != twice.vectors[4]).any()
    near = degrees_between(once.vectors.astype(float)[:, None], once.vectors.astype(float)[None]) + 360 * np.eye(30)
    assert np.allclose(np.degrees(once.limit), near.min(1) / 2, atol=1e-3)    # limits follow the new neighbours


def test_pictures_of_people_who_are_not_there():
    plan = SamplingPlan(n=3, dim=8)
    people = make_identities(plan)
    for who, number in (([3], [0]), ([-1], [0]), ([0], [-1])):
        with pytest.raises(DataError, match="identities 0 to 2"):
            plan_pictures(plan, people, who, number)
    assert len(plan_pictures(plan, people, [], []).vectors) == 0

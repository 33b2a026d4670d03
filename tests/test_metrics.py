"""Metrics against other libraries, against their definitions written out slowly, on faults, and on real faces."""
import copy
import math
import pickle
import tracemalloc
import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from hyperface.core import ConfigError, DataError, data_dir, find_model, models_dir, read_json, rng, write_json
from hyperface.metrics import confusion as C
from hyperface.metrics import fairness as F
from hyperface.metrics import verification as V


def scored(seed, n=400, levels=None, share=.5):
    "Scores and labels; `levels` rounds the scores so that many are equal."
    g = rng(seed, "scored")
    y = g.random(n) < share
    y[:2] = True, False
    s = np.clip(g.normal(np.where(y, .35, 0), .2), -1, 1)
    return (s if levels is None else np.round(s*levels)/levels), y


SHAPES = [dict(), dict(levels=10), dict(levels=2), dict(n=2), dict(n=1000, share=.02), dict(n=1000, share=.98, levels=50)]


# ---- agreement with scikit-learn -------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_curves_agree_with_sklearn(seed, shape):
    s, y = scored(seed, **shape)
    curve = V.roc(s, y)
    fpr, tpr, thr = sk.roc_curve(y, s, drop_intermediate=False)
    assert np.array_equal(curve.far, fpr) and np.array_equal(curve.tar, tpr) and np.array_equal(curve.thresholds, thr)
    assert abs(V.auc(s, y) - sk.roc_auc_score(y, s)) < 1e-12
    far, frr, thr = sk.det_curve(y, s)
    at = V.det(s, y).index(thr)
    assert np.abs(curve.far[at] - far).max() < 1e-12 and np.abs(curve.frr[at] - frr).max() < 1e-12
    for target in (0, 1e-3, 1e-2, .1, .5, 1):
        assert float(V.tar_at_far(s, y, far=target)) == tpr[fpr <= target].max()
    t = float(np.quantile(s, .6))
    c = C.confusion(s, y, threshold=t)
    assert c.matrix.tolist() == sk.confusion_matrix(y, s >= t, labels=[True, False]).tolist()
    assert abs(c.mcc - sk.matthews_corrcoef(y, s >= t)) < 1e-12 if not math.isnan(c.mcc) else sk.matthews_corrcoef(y, s >= t) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_repetitions(shape):
    s, y = scored(3, **shape)
    w = rng(0, "weights").integers(0, 4, len(s)); w[:2] = 1
    weighted, repeated = V.SortedPairs(s, y).curve(w), V.roc(np.repeat(s, w), np.repeat(y, w))
    assert abs(V.auc(weighted) - V.auc(repeated)) < 1e-12
    assert abs(V.eer(weighted) - V.eer(repeated)) < 1e-12
    for far in (0, .01, .3): assert abs(V.tar_at_far(weighted, far=far) - V.tar_at_far(repeated, far=far)) < 1e-12
    assert abs(V.auc(weighted) - sk.roc_auc_score(y, s, sample_weight=w)) < 1e-12


@pytest.mark.parametrize("k,n", [(0, 1), (1, 1), (0, 50), (50, 50), (7, 50), (9999, 10000), (3, 10**6)])
@pytest.mark.parametrize("level", [.5, .9, .99])
def test_intervals_agree_with_scipy(k, n, level):
    for ours, theirs in (("wilson", "wilson"), ("clopper-pearson", "exact")):
        ci = binomtest(k, n).proportion_ci(level, theirs)
        assert np.allclose(V.proportion_interval(k, n, level, ours), (ci.low, ci.high), rtol=0, atol=1e-12)


# ---- definitions, slowly ---------------------------------------------------------------------------------------------

def eer_exactly(s, y):
    "Crossing of the ROC polyline with FAR = FRR in rational arithmetic."
    G, I = int(y.sum()), int((~y).sum())
    points = [(Fraction(int((s[~y] >= t).sum()), I), Fraction(int((s[y] < t).sum()), G)) for t in [np.inf, *np.unique(s)[::-1]]]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x1 >= y1:
            return x0 + (y0 - x0)/((x1 - x0) + (y0 - y1))*(x1 - x0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_eer_is_the_crossing(seed, shape):
    s, y = scored(seed, **shape)
    assert abs(float(eer_exactly(s, y)) - V.eer(s, y)) < 1e-12
    step = V.eer(s, y, method="step")
    at = V.roc(s, y).at(step.threshold)
    assert abs(step - (at["far"] + at["frr"])/2) < 1e-15
    # symmetric under exchange of the classes with the scores negated
    assert abs(V.eer(-s, ~y) - V.eer(s, y)) < 1e-12 and abs(V.auc(-s, ~y) - V.auc(s, y)) < 1e-12


def slow_folds(s, y, fold, protocol):
    "Both protocols as their texts say, every threshold tried on every pair."
    accuracies, thresholds = [], []
    for f in np.unique(fold):
        train, test = fold != f, fold == f
        if protocol == "lfw":
            candidates = [np.inf, *sorted(set(s[train]), reverse=True)]
            accept = lambda part, t: s[part] >= t
        else:
            candidates = np.arange(0, 4, .01)
            d = 2 - 2*s
            accept = lambda part, t: d[part] < t
        best = max(range(len(candidates)), key=lambda k: (np.mean(accept(train, candidates[k]) == y[train]), -k))
        thresholds.append(candidates[best])
        accuracies.append(np.mean(accept(test, candidates[best]) == y[test]))
    return accuracies, thresholds


@pytest.mark.parametrize("protocol", ["lfw", "insightface"])
@pytest.mark.parametrize("shape", [dict(n=100), dict(n=97, levels=10), dict(n=150, levels=3), dict(n=20, levels=2)])
def test_folds_are_the_protocol(protocol, shape):
    for seed in range(4):
        s, y = scored(seed, **shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for folds in (10, 3, rng(seed, "f").permutation(np.arange(len(s)) % 7)):
                fold = folds if np.ndim(folds) else np.concatenate([np.full(len(part), k) for k, part in enumerate(np.array_split(np.arange(len(s)), folds))])
                result = V.kfold_accuracy(s, y, folds, protocol)
                accuracies, thresholds = slow_folds(s, y, fold, protocol)
                assert np.allclose(result.accuracies, accuracies, rtol=0, atol=1e-15) and np.allclose(result.thresholds, thresholds)
                assert result.mean == float(result) == pytest.approx(np.mean(accuracies), abs=1e-15)
                assert result.std == pytest.approx(np.std(accuracies), abs=1e-15)
                assert result.standard_error == pytest.approx(np.std(accuracies, ddof=1)/np.sqrt(len(accuracies)), abs=1e-15)


def test_contiguous_folds_are_sklearns_kfold():
    from sklearn.model_selection import KFold
    for n, k in ((6000, 10), (103, 10), (11, 4)):
        fold = V.fold_numbers(k, n)
        for f, (_, test) in enumerate(KFold(k, shuffle=False).split(np.arange(n))):
            assert np.array_equal(np.flatnonzero(fold == f), test)


def test_insightface_from_its_embeddings():
    "The distance route (vectors, squared differences, grids) gives what the score route gives."
    g = rng(0, "insightface")
    y = np.tile(np.repeat([True, False], 30), 10)
    a = g.standard_normal((600, 32)); b = np.where(y[:, None], a + 2*g.standard_normal((600, 32)), g.standard_normal((600, 32)))
    a, b = (x/np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    d = ((a - b)**2).sum(1)
    fold, grid, fine, target = np.repeat(np.arange(10), 60), np.arange(0, 4, .01), np.arange(0, 4, .001), .02
    accuracies, values, fars = [], [], []
    for f in range(10):
        train, test = fold != f, fold == f
        t = grid[np.argmax([np.mean((d[train] < x) == y[train]) for x in grid])]
        accuracies.append(np.mean((d[test] < t) == y[test]))
        far = np.array([np.mean(d[train & ~y] < x) for x in fine])
        t = np.interp(target, far, fine) if far.max() >= target else 0
        values.append(np.mean(d[test & y] < t)); fars.append(np.mean(d[test & ~y] < t))
    s = V.pair_scores(a, b)
    assert np.array_equal(V.kfold_accuracy(s, y, protocol="insightface").accuracies, accuracies)
    val = V.val_at_far(s, y, far=target)
    assert np.allclose(val.values, values, rtol=0, atol=1e-15) and np.allclose(val.fars, fars, rtol=0, atol=1e-15)
    assert np.std(values) > .01 and val.std == pytest.approx(np.std(values), abs=1e-15)


@pytest.mark.parametrize("target", [.1, .2, .25, .5])
def test_val_at_grid_points(target):
    "Distances that lie exactly on the grid: a pair at the threshold is rejected."
    for seed in range(5):
        g, y = rng(seed, "val"), np.tile(np.repeat([True, False], 20), 4)
        s = 1 - np.where(y, g.integers(1, 6, 160), g.integers(3, 8, 160))*.125/2   # d = 2 - 2s is a multiple of 1/8, exactly
        d, fold, grid = 2 - 2*s, np.repeat(np.arange(4), 40), np.arange(0, 4, .001)
        val = V.val_at_far(s, y, far=target, folds=4)
        for f in range(4):
            far = np.array([np.mean(d[(fold != f) & ~y] < x) for x in grid])
            t = np.interp(target, far, grid)
            assert val.thresholds[f] == t
            assert val.values[f] == np.mean(d[(fold == f) & y] < t) and val.fars[f] == np.mean(d[(fold == f) & ~y] < t)


def test_val_rejects_at_the_threshold():
    y = np.array([1, 1, 0, 0]*2); d = np.array([.5, 1., 1., 1.5]*2)               # far is 0 up to d = 1, one half above: never above 1/4
    val = V.val_at_far(1 - d/2, y, far=.25, folds=2)
    assert (val.thresholds > 1).all() and (val.thresholds < 1.0015).all() and (val.values == 1).all()
    far_apart = V.val_at_far(1 - np.array([.5, 3.9, 3.999, 3.999]*2)/2, y, far=.25, folds=2)
    assert (far_apart.thresholds == 0).all() and (far_apart.values == 0).all()    # the grid never reaches the target


def test_a_curve_without_plateaus_interpolates_as_scipys_slinear():
    from scipy.interpolate import interp1d
    far, grid = np.sort(rng(0, "f").random(50)), np.arange(50)*.01
    for x in rng(1, "x").uniform(far[0], far[-1], 20):
        assert float(interp1d(far, grid, kind="slinear")(x)) == pytest.approx(np.interp(x, far, grid), abs=1e-12)


def test_heldout_thresholds_never_see_the_people_they_judge():
    g = rng(0, "heldout")
    who = np.repeat(np.arange(30), 4)
    x = g.standard_normal((30, 16)).repeat(4, 0) + .5*g.standard_normal((120, 16))
    i, j = np.triu_indices(120, 1)
    s, y = V.pair_scores(x[i], x[j]), who[i] == who[j]
    folds = {p: p % 3 for p in range(30)}
    result = V.heldout_rates(s, y, who[i], who[j], far=.02, folds=folds)
    for f in range(3):
        train = (who[i] % 3 != f) & (who[j] % 3 != f)
        test = (who[i] % 3 == f) & (who[j] % 3 == f)
        t = V.tar_at_far(s[train], y[train], far=.02).threshold
        row = result.folds.loc[f]
        assert row.threshold == t and row.true_accepts == (s[test & y] >= t).sum() and row.false_accepts == (s[test & ~y] >= t).sum()
        changed = np.where(train, s, rng(f, "noise").uniform(-1, 1, len(s)))      # whatever the others score, the threshold stays
        assert V.heldout_rates(changed, y, who[i], who[j], far=.02, folds=folds).folds.loc[f].threshold == t


# ---- ties, one class, bad input --------------------------------------------------------------------------------------

def test_all_scores_equal():
    s, y = np.full(10, .3), np.arange(10) < 4
    assert V.eer(s, y) == .5 and V.auc(s, y) == .5
    assert V.tar_at_far(s, y, far=.5) == 0 and V.tar_at_far(s, y, far=1) == 1
    assert V.tar_at_far(s, y, far=.5, method="interpolated") == .5


def test_ties_do_not_depend_on_the_order_of_the_file():
    s, y = scored(0, levels=5)
    for seed in range(3):
        p = rng(seed, "order").permutation(len(s))
        assert V.eer(s[p], y[p]) == V.eer(s, y) and V.auc(s[p], y[p]) == V.auc(s, y) and V.tar_at_far(s[p], y[p], far=.1) == V.tar_at_far(s, y, far=.1)


@pytest.mark.parametrize("call", [V.roc, V.det, V.eer, V.auc, V.tar_at_far, V.kfold_accuracy, V.val_at_far, V.VerificationReport])
@pytest.mark.parametrize("s,y,word", [
    ([.1, .2, .3, .4]*5, [1]*20, "impostor"), ([.1, .2, .3, .4]*5, [0]*20, "genuine"), ([], [], "no pairs"), ([.1]*20, [1, 0]*9, "length"),
    ([np.nan] + [.1]*19, [1, 0]*10, "not finite"), ([.1]*19 + [np.inf], [1, 0]*10, "pair 19"), ([.1]*20, [1, 2]*10, "labels"), ([.1]*20, [-1, 0]*10, "labels"),
    (np.zeros((20, 2)), [1, 0]*10, "one-dimensional"), (["a"]*20, [1, 0]*10, "numbers"), ([.1]*20, ["same", "different"]*10, "numbers"), ([None] + [.1]*19, [1, 0]*10, "not finite"),
    ([.1]*20, [1, 0]*9 + [1, np.nan], "labels")])
def test_bad_input_is_named(call, s, y, word):
    with pytest.raises(DataError, match=word): call(s, y)


@pytest.mark.parametrize("call", [lambda s, y: V.tar_at_far(s, y, far=2), lambda s, y: V.tar_at_far(s, y, far=np.nan), lambda s, y: V.tar_at_far(s, y, method="linear"), lambda s, y: V.tar_at_far(s, y, interval="wald"),
    lambda s, y: V.tar_at_far(s, y, level=95), lambda s, y: V.eer(s, y, method="x"), lambda s, y: V.kfold_accuracy(s, y, protocol="LFW10"), lambda s, y: V.kfold_accuracy(s, y, folds=1), lambda s, y: V.kfold_accuracy(s, y, folds=401),
    lambda s, y: V.kfold_accuracy(s, y, folds=2.5), lambda s, y: V.kfold_accuracy(s, y, folds=None), lambda s, y: V.kfold_accuracy(s, y, folds=np.nan), lambda s, y: V.roc(s, y).at(np.nan), lambda s, y: V.tar_at_far(s, y, far='1e-3x'), lambda s, y: V.tar_at_far(s, y, far=None), lambda s, y: C.confusion(s, y, None), lambda s, y: C.confusion(s, y, np.nan), lambda s, y: V.eer(s), lambda s, y: V.eer(V.roc(s, y), y)])
def test_bad_settings_are_refused(call):
    with pytest.raises(ConfigError): call(*scored(0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, bool])
def test_types_of_scores(dtype):
    y = np.array([1, 1, 0, 1, 0, 0]); s = np.array([9, 7, 7, 5, 3, 1]).astype(dtype)
    assert V.auc(s, y) == pytest.approx(sk.roc_auc_score(y, s.astype(float)), abs=1e-12)
    import torch
    if dtype is not bool: assert V.eer(torch.tensor(s), torch.tensor(y)) == V.eer(s, y)


def test_unsigned_scores_are_not_negated_around():
    assert V.auc(np.array([255, 0], np.uint8), [1, 0]) == 1 and V.roc(np.array([255, 0], np.uint8), [1, 0]).at(128)["tar"] == 1


def test_results_survive_copies_pickles_and_json(tmp_path):
    s, y = scored(0)
    for result in (V.tar_at_far(s, y), V.kfold_accuracy(s, y), V.eer(s, y), V.val_at_far(s, y, far=.01)):
        for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), copy.copy(result)):
            assert twin == result and repr(twin) == repr(result) and twin.threshold == result.threshold
        assert read_json(write_json(tmp_path/"r.json", dict(x=result)))["x"] == float(result)
        assert f"{result:.3f}" == f"{float(result):.3f}" and np.array([result]).dtype == np.float64


def test_masked_scores_are_missing_scores():
    with pytest.raises(DataError, match="pair 1"): V.eer(np.ma.masked_array([.9, .8, .1], mask=[0, 1, 0]), [1, 1, 0])


def test_extreme_lengths_of_embeddings():
    a = rng(0, "length").standard_normal((5, 8))
    for scale in (1e-250, 1e250): assert np.abs(V.pair_scores(a*scale, -a/scale) + 1).max() < 1e-15


def test_pair_scores():
    g = rng(0, "pairs")
    a, b = g.standard_normal((2, 1000, 64))
    exact = (a*b).sum(1)/np.linalg.norm(a, axis=1)/np.linalg.norm(b, axis=1)
    assert np.abs(V.pair_scores(a, b) - exact).max() < 1e-14
    assert np.array_equal(V.pair_scores(a, b, chunk=7), V.pair_scores(a, b))
    assert (V.pair_scores(a, a) == 1).all() and (V.pair_scores(a, -a) == -1).all()
    import torch
    assert np.array_equal(V.pair_scores(torch.tensor(a), torch.tensor(b)), V.pair_scores(a, b))
    for theta in (1e-3, 1e-5, 1e-7):                                     # digits near 1 that a dot product of float64 loses
        s = V.pair_scores([[1., 0., 0.]], [[np.cos(theta), np.sin(theta), 0.]])[0]
        assert (1 - s) == pytest.approx(2*np.sin(theta/2)**2, rel=1e-2 if theta < 1e-6 else 1e-4)
    assert V.pair_scores(np.zeros((0, 5)), np.zeros((0, 5))).shape == (0,)
    for bad in ((a, b[:, :3]), (a[0], b[0]), (a*np.nan, b), (a*0, b)):
        with pytest.raises(DataError): V.pair_scores(*bad)


# ---- streaming -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("step", [2.**-3, 2.**-8, 2.**-15])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_streaming_encloses_the_exact_figures(seed, step, dtype):
    g = rng(seed, "streaming")
    y = g.random(3000) < .3
    s = [g.normal(np.where(y, .5, 0), .25), np.round(g.normal(np.where(y, .5, 0), .25), 1), np.where(y, 1., -1.)*g.integers(0, 2, 3000),
         g.normal(np.where(y, 5, 0), 3), g.standard_cauchy(3000)*.2 + y, np.full(3000, .5)][seed].astype(dtype)
    stream = V.StreamingROC(step=step)
    for part in np.array_split(g.permutation(3000), 5): stream.merge(V.StreamingROC(step=step).update(s[part], y[part]))
    assert np.array_equal(stream.counts, V.StreamingROC(step=step).update(s, y).counts) and stream.counts.sum() == 3000
    exact, edges = V.roc(s, y), stream.curve()
    for k in range(1, len(edges) - 1, max(len(edges)//50, 1)):            # exact at every edge
        at = exact.at(edges.thresholds[k])
        assert at["far"] == edges.far[k] and at["frr"] == edges.frr[k]
    slack = 1e-12
    bracket, value = stream.auc(), V.auc(exact)
    assert bracket.low - slack <= value <= bracket.high + slack and bracket.low <= bracket <= bracket.high
    bracket, value = stream.eer(), V.eer(exact)
    assert bracket.low - slack <= value <= bracket.high + slack and bracket.low <= bracket <= bracket.high
    above = int(np.argmax(edges.far >= edges.frr))                        # the smallest box that the edges allow
    assert stream.eer().low == max(edges.far[above - 1], edges.frr[above]) and stream.eer().high == min(edges.far[above], edges.frr[above - 1])
    for far in (0, 1e-3, .01, .2, 1):
        bracket, value = stream.tar_at_far(far), V.tar_at_far(exact, far=far)
        assert bracket.low <= value <= bracket.high and edges.at(bracket.threshold)["far"] <= far


def test_streaming_edges_and_faults():
    stream = V.StreamingROC(step=.25)
    stream.update([-2, -1, -1e-300, -0., 0, 1e-300, .25, .9999999999999999, 1, 1.0000001, 7], [0]*11)
    counts = stream.counts[0]
    assert counts[0] == 1 and counts[1] == 1 and counts[4] == 1 and counts[5] == 3 and counts[6] == 1 and counts[8] == 1 and counts[9] == 3
    before = stream.counts.copy()
    assert np.array_equal(stream.update([], []).counts, before)
    for bad in (lambda: stream.update([np.nan], [1]), lambda: stream.update([.1], [1, 0]), lambda: stream.merge(V.StreamingROC(step=.5)), lambda: stream.eer()):
        with pytest.raises(DataError): bad()
    assert np.array_equal(stream.counts, before)
    for bad in (dict(step=.3), dict(step=0), dict(step=-.5), dict(low=1, high=-1), dict(low=-.3), dict(step=2.**-40)):
        with pytest.raises(ConfigError): V.StreamingROC(**bad)


def test_streaming_counts_on_disk(tmp_path):
    s, y = scored(0)
    path = V.StreamingROC(step=2.**-9).update(s, y).save(tmp_path/"c.npz")
    assert np.array_equal(V.load_streaming(path).update(s, y).counts, 2*V.StreamingROC(step=2.**-9).update(s, y).counts)
    from hyperface.core import write_npz
    for name, content in dict(other=dict(a=np.zeros(3)), short=dict(counts=np.zeros((2, 3), np.int64), low=-1, high=1, step=.5), kind=dict(counts=np.zeros((2, 6)), low=-1, high=1, step=.5), step=dict(counts=np.zeros((2, 6), np.int64), low=-1, high=1, step=.3)).items():
        with pytest.raises(DataError, match=name): V.load_streaming(write_npz(tmp_path/f"{name}.npz", **content))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="c.npz"): V.load_streaming(path)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("per", [1, 3, 40])
def test_all_pairs_are_all_pairs(chunk, per):
    g = rng(0, "all pairs", per)
    n = 120
    who = np.array([f"p{k:03d}" for k in g.permutation(n) // per])
    x = g.standard_normal((n, 24)).astype(np.float32)
    counter = V.all_pairs(x, who, chunk=chunk)
    i, j = np.triu_indices(n, 1)
    s, y = V.pair_scores(x[i], x[j]), who[i] == who[j]
    assert counter.counts.sum(1).tolist() == [int((~y).sum()), int(y.sum())]
    if per > 1:
        assert abs(counter.auc() - V.auc(s, y)) < 1e-3 and abs(counter.eer() - V.eer(s, y)) < 1e-3
    slow = V.StreamingROC().update(s, y)
    assert np.abs(np.cumsum(counter.counts - slow.counts, axis=1)).max() <= 2   # float32 products move a score by less than a bin
    parts = V.StreamingROC()
    for k in range(3): V.all_pairs(x, who, parts, chunk, (k, 3))
    assert np.array_equal(parts.counts, counter.counts)


def test_all_pairs_needs_little_memory():
    x = rng(0, "memory").standard_normal((6000, 32)).astype(np.float32)
    tracemalloc.start()
    counter = V.all_pairs(x, np.arange(6000)//3, chunk=512)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert counter.counts.sum() == 6000*5999//2 and counter.counts[1].sum() == 6000
    assert peak < 40e6                                                      # the matrix alone would be 144 MB


@pytest.mark.parametrize("bad", [lambda x, w: V.all_pairs(x, w[:-1]), lambda x, w: V.all_pairs(x*np.nan, w), lambda x, w: V.all_pairs(x[0], w), lambda x, w: V.all_pairs(x, [None]*len(x)), lambda x, w: V.all_pairs(x, w, part=(3, 3))])
def test_all_pairs_faults(bad):
    with pytest.raises((DataError, ConfigError)): bad(np.ones((6, 4)), np.arange(6)//2)


# ---- bootstrap -------------------------------------------------------------------------------------------------------

def population(seed, people=25, per=6, dim=16):
    "All pairs of people of whom some are shaky."
    g = rng(seed, "population")
    x = g.standard_normal((people, 1, dim)) + g.standard_normal((people, per, dim))*g.uniform(.2, 1.6, (people, 1, 1))
    x = x.reshape(-1, dim); x /= np.linalg.norm(x, axis=1, keepdims=True)
    who, (i, j) = np.repeat(np.arange(people), per), np.triu_indices(people*per, 1)
    return (x @ x.T)[i, j], who[i] == who[j], who[i], who[j]


def test_the_identity_bootstrap_covers_and_the_pair_interval_does_not():
    truth = float(np.mean([V.auc(*population(seed)[:2]) for seed in range(1000, 1080)]))
    covered, naive = [], []
    for seed in range(50):
        s, y, p, q = population(seed)
        rate = V.identity_bootstrap(s, y, p, q, V.auc, n=80, level=.9)
        covered.append(rate.low <= truth <= rate.high)
        pairs, g = V.SortedPairs(s, y), rng(seed, "naive")
        draws = [V.auc(pairs.curve(g.poisson(1, len(s)))) for _ in range(20)]
        naive.append(abs(V.auc(s, y) - truth) < 1.645*np.std(draws))
    assert np.mean(covered) >= .76                                          # 90 % asked for; five standard errors of 50 trials below: .69
    assert np.mean(naive) < .6


def test_bootstrap_weights_are_what_drawing_people_means():
    p, q = np.array(["a", "a", "b", "a"]), np.array(["a", "b", "b", "c"])
    for w in V.identity_weights(p, q, 20, seed=1):
        a, b = w[0], w[2]                                                   # genuine pairs show how often a and b were drawn
        assert w[1] == a*b and w[3] == a*(3 - a - b)
    one, two = (list(V.identity_weights(p, q, 3, seed=5)) for _ in range(2))
    assert np.array_equal(one, two) and not np.array_equal(one, list(V.identity_weights(p, q, 3, seed=6)))


def trials(seed, people=40, per=2, less=0., dim=16):
    "All pairs of one sample of people as two systems score them; the second has `less` noise, and noise of its own."
    g, who = rng(seed, "trials"), np.repeat(np.arange(people), per)
    centre = g.standard_normal((people, dim)); centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    shared, own = g.standard_normal((2, len(who), dim))
    loud = g.uniform(.2, .6, people)[who, None]
    i, j = np.triu_indices(len(who), 1)
    seen = [centre[who] + loud*shared, centre[who] + loud*(1 - less)*(.9*shared + .436*own)]
    return *(V.pair_scores(x[i], x[j]) for x in seen), who[i] == who[j], who[i], who[j]


def test_paired_bootstrap_is_the_difference_under_the_same_people():
    a, b, y, p, q = trials(0)
    gain = V.paired_bootstrap([b, a, b], [a, a], y, p, q, V.auc, n=25, seed=4)
    auc = lambda s, w: float((np.outer(w[y], w[~y])*((s[y][:, None] > s[~y]) + .5*(s[y][:, None] == s[~y]))).sum()/(w[y].sum()*w[~y].sum())) # Mann and Whitney's count
    expected = [np.mean([auc(s, w) for s in (b, a, b)]) - auc(a, w) for w in V.identity_weights(p, q, 25, seed=4)]
    assert np.allclose(gain.samples, expected, atol=1e-12)
    assert np.allclose([gain.low, gain.high], np.quantile(expected, [.025, .975]), atol=1e-12)
    assert float(gain) == pytest.approx(2/3*(V.auc(b, y) - V.auc(a, y)), abs=1e-12) and gain.by_seed is None     # not seed by seed: three against two
    one, other = (V.paired_bootstrap(*x, y, p, q, n=25) for x in ((a, b), (b, a)))
    assert np.array_equal(one.samples, -other.samples) and (one.low, one.high) == pytest.approx((-other.high, -other.low))
    runs = V.paired_bootstrap([a, b], [b, b], y, p, q, n=25)
    assert runs.by_seed == pytest.approx([float(one), 0]) and np.allclose(runs.samples, one.samples/2)
    none = V.paired_bootstrap(a, a, y, p, q, n=25)
    assert (float(none), none.low, none.high) == (0, 0, 0)


@pytest.mark.parametrize("less", [0., .15])
def test_the_paired_interval_covers_the_true_difference_and_is_the_narrower(less):
    truth = np.mean([V.auc(s[1], s[2]) - V.auc(s[0], s[2]) for s in (trials(k, less=less) for k in range(1000, 1080))])
    covered, narrower, found = [], [], []
    for k in range(50):
        a, b, y, p, q = trials(k, less=less)
        gain = V.paired_bootstrap(b, a, y, p, q, V.auc, n=60, level=.9)
        covered.append(gain.low <= truth <= gain.high); found.append(gain.low > 0 or gain.high < 0)
        if k >= 10: continue
        apart = [V.identity_bootstrap(s, y, p, q, V.auc, n=60, seed=i) for i, s in enumerate((a, b))]       # other people for each
        narrower.append(gain.samples.std()/(apart[1].samples - apart[0].samples).std())
    assert 40 <= sum(covered) <= 50, sum(covered)                                         # binomial: 45 +- 2.1 if 90 % is meant
    assert np.median(narrower) < .85
    assert (sum(found) > 30) if less else (sum(found) < 11)                               # a real gain is seen; none is not invented


def test_fold_margins_decide_as_the_folds_do():
    s, y = scored(1, n=600, levels=40); fold = rng(0, "folds").integers(5, size=600)
    found = V.kfold_accuracy(s, y, fold)
    margin = V.fold_margins(s, y, fold)
    assert np.array_equal(margin >= 0, s >= found.thresholds[fold])
    assert V.accuracy_at(V.roc(margin, y)) == pytest.approx(((margin >= 0)[y].mean() + (margin < 0)[~y].mean())/2)
    hopeless = V.fold_margins([.1, .2, .3, .4], [1, 0, 1, 0], [0, 0, 1, 1])                # on either fold the best threshold accepts nobody
    assert np.isfinite(hopeless).all() and (hopeless < 0).all()


def test_bootstrap_faults():
    s, y, p, q = population(0)
    for bad in (lambda: V.SortedPairs(s, y).curve(np.ones(3)), lambda: V.SortedPairs(s, y).curve(-np.ones(len(s))), lambda: V.SortedPairs(s, y).curve(np.zeros(len(s))), lambda: V.identity_bootstrap(s, ~y, p, q), lambda: V.identity_bootstrap(s[1:], y[1:], p, q), lambda: V.identity_bootstrap(s, y, p.astype(float)*np.nan, q),
                lambda: V.identity_bootstrap([.9, .1], [1, 0], ["a", "a"], ["a", "b"], n=50)):
        with pytest.raises(DataError): bad()
    with pytest.raises(ConfigError): V.identity_bootstrap(s, y, p, q, level=95)
    for bad in (lambda: V.paired_bootstrap(s[1:], s, y, p, q), lambda: V.paired_bootstrap(s, s[None, None], y, p, q), lambda: V.paired_bootstrap(s, s*np.nan, y, p, q), lambda: V.paired_bootstrap(s, s, y, p, q[1:]), lambda: V.paired_bootstrap(s, s, ~y, p, q), lambda: V.paired_bootstrap([], s, y, p, q)):
        with pytest.raises(DataError): bad()


# ---- confusion -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts,accuracy,f1,specificity,recall", [((9750, 250, 300, 9700), .9725, .9726, .970, .975), ((9800, 200, 220, 9780), .9790, .9790, .978, .980), ((9670, 330, 350, 9650), .9660, .9660, .965, .967)])
def test_the_papers_counts(counts, accuracy, f1, specificity, recall):
    c = C.Confusion(**dict(zip(("tp", "fn", "fp", "tn"), counts)))
    assert (round(c.accuracy, 4), round(c.f1, 4), round(c.specificity, 4), round(c.recall, 4)) == (accuracy, f1, specificity, recall)
    assert c.sensitivity == c.recall and c.fpr == pytest.approx(1 - c.specificity) and c.fnr == pytest.approx(1 - c.recall)
    assert C.Confusion(tp=0, fn=5, fp=0, tn=5).f1 == 0 and math.isnan(C.Confusion(tp=0, fn=0, fp=0, tn=5).f1)
    exact = Fraction(2*c.tp, 2*c.tp + c.fp + c.fn)
    assert abs(c.f1 - float(exact)) < 1e-15


def test_confusion_of_a_billion_pairs_does_not_overflow():
    c = C.Confusion(tp=10**9, fn=10**7, fp=10**10, tn=10**15)
    exact = (Fraction(c.tp*c.tn - c.fp*c.fn)**2)/((c.tp + c.fp)*(c.tp + c.fn)*(c.tn + c.fp)*(c.tn + c.fn))
    assert c.mcc == pytest.approx(math.sqrt(exact), rel=1e-12) and c.precision == pytest.approx(1/11, rel=1e-12)


@pytest.mark.parametrize("bad", [dict(tp=-1, fn=0, fp=0, tn=0), dict(tp=1.5, fn=0, fp=0, tn=0), dict(tp="9750", fn=0, fp=0, tn=0), dict(tp=None, fn=0, fp=0, tn=0), dict(tp=np.inf, fn=0, fp=0, tn=0)])
def test_confusion_refuses(bad):
    with pytest.raises(DataError): C.Confusion(**bad)


def test_confusion_adds_copies_and_shows_itself():
    a, b = C.Confusion(tp=1, fn=2, fp=3, tn=4, threshold=.5), C.Confusion(tp=np.int64(5), fn=6., fp=7, tn=8, threshold=.5)
    assert (a + b).matrix.tolist() == [[6, 8], [10, 12]] and (a + b).threshold == .5
    assert pickle.loads(pickle.dumps(a)) == a and copy.deepcopy(a) == a and a.f1 == pytest.approx(2/7)
    assert "0.2857" in a._repr_html_() and C.Confusion(tp=0, fn=0, fp=0, tn=0)._repr_html_().count("n.a.") >= 11
    with pytest.raises(AttributeError): a.nonsense


@pytest.mark.parametrize("name", C.RATIOS)
def test_ratio_intervals_hold_their_value_and_cover(name):
    truth, g, hits = np.array([.42, .08, .05, .45]), rng(0, "cover", name), 0
    exact = C.Confusion(tp=4200, fn=800, fp=500, tn=4500).ratios()[name]
    for k in range(120):
        tp, fn = g.multinomial(500, truth[:2]/truth[:2].sum()); fp, tn = g.multinomial(500, truth[2:]/truth[2:].sum())
        rate = C.ratio_interval(C.Confusion(tp=tp, fn=fn, fp=fp, tn=tn), name, level=.9)
        assert rate.low <= rate <= rate.high and rate.low < rate.high
        hits += rate.low <= exact <= rate.high
    assert hits/120 > .8


def test_no_errors_is_no_certainty():
    c = C.Confusion(tp=20, fn=0, fp=0, tn=20)
    for name in C.RATIOS:
        rate = C.ratio_interval(c, name)
        assert rate.high - rate.low > .05 and rate.low <= rate <= rate.high


# ---- fairness --------------------------------------------------------------------------------------------------------

def groups(seed=0, n=4000, k=4):
    g = rng(seed, "groups")
    a = g.integers(k, size=n); y = g.random(n) < .4
    b = np.where(y, a, g.integers(k, size=n))
    return g.normal(np.where(y, .5 - .05*a, .02*a), .15), y, a, b


def test_fairness_is_its_formulas():
    s, y, a, b = groups()
    r = F.fairness(s, y, a, b, far=.02)
    t = V.tar_at_far(s, y, far=.02).threshold
    fmr = np.array([np.mean(s[~y & (a == k) & (b == k)] >= t) for k in range(4)]); fnmr = np.array([np.mean(s[y & (a == k)] < t) for k in range(4)])
    assert r.table.impostor.tolist() == [int((~y & (a == k) & (b == k)).sum()) for k in range(4)] and r.table.genuine.tolist() == [int((y & (a == k)).sum()) for k in range(4)]
    assert r.threshold == t and np.allclose(r.table.FMR, fmr, atol=1e-15) and np.allclose(r.table.FNMR, fnmr, atol=1e-15)
    gini = lambda x: 4/3*np.abs(x[:, None] - x[None]).sum()/(2*16*x.mean())
    expect = {"FMR gap": np.ptp(fmr), "FNMR gap": np.ptp(fnmr), "FMR std": fmr.std(), "FNMR std": fnmr.std(), "FMR Gini (FPD)": gini(fmr), "FNMR Gini (FND)": gini(fnmr),
              "FDR": 1 - .5*np.ptp(fmr) - .5*np.ptp(fnmr), "IR": math.sqrt(fmr.max()/fmr.min()*fnmr.max()/fnmr.min()), "GARBE": .5*gini(fmr) + .5*gini(fnmr), "SER": (fmr + fnmr).max()/(fmr + fnmr).min(),
              "FMR ratio": fmr.max()/fmr.min(), "FNMR ratio": fnmr.max()/fnmr.min()}
    for name, value in expect.items(): assert float(r.summary[name]) == pytest.approx(value, abs=1e-12), name
    for i in range(4):
        for j in range(4):
            pair = ~y & (((a == i) & (b == j)) | ((a == j) & (b == i)))
            assert r.cross.iloc[i, j] == pytest.approx(np.mean(s[pair] >= t), abs=1e-15)


def test_fairness_does_not_depend_on_names_order_or_side():
    s, y, a, b = groups(1)
    base = F.fairness(s, y, a, b, far=.02)
    p = rng(0, "p").permutation(len(s))
    for other in (F.fairness(s[p], y[p], a[p], b[p], far=.02), F.fairness(s, y, b, a, far=.02), F.fairness(s, y, np.array(list("zyxw"))[a], np.array(list("zyxw"))[b], far=.02)):
        for name in base.summary: assert float(other.summary[name]) == pytest.approx(float(base.summary[name]), abs=1e-12)


def test_equal_groups_are_fair():
    s, y, *_ = groups(2)
    twice = F.fairness(np.tile(s, 2), np.tile(y, 2), np.repeat(["x", "y"], len(s)), far=.05)
    for name, value in twice.summary.items(): assert float(value) == pytest.approx(F.FAIR[name], abs=1e-12), name


def test_genuine_pairs_of_two_groups_count_in_neither():
    s, y, a, b = groups(6)
    b = np.where(y & (np.arange(len(s)) % 5 == 0), (a + 1) % 4, b)          # photographs of one person at two ages
    r = F.fairness(s, y, a, b, threshold=.3)
    assert r.table.genuine.tolist() == [int((y & (a == k) & (b == k)).sum()) for k in range(4)]
    assert r.table.FNMR.tolist() == [np.mean(s[y & (a == k) & (b == k)] < .3) for k in range(4)]
    assert f"{int((y & (a != b)).sum()):,} genuine pairs join two groups" in r.note
    with pytest.raises(DataError, match="two groups"): F.chance_level(r, np.where(y, 0, np.arange(len(s)) + 1), np.where(y, 0, -np.arange(len(s)) - 1), n=5)


def test_p_values_count_the_measured_labels_as_one_shuffle():
    s, y, p, q = population(1, people=24, per=4)
    group = np.repeat(["x", "y"], 12)
    r = F.fairness(np.where(y & (group[p] == "y"), s - .9, s), y, group[p], group[q], far=.02)
    assert F.chance_level(r, p, q, n=19).loc["FNMR gap", "p"] == pytest.approx(1/20)
    same = F.fairness(np.where(y, .9, .1), y, group[p], group[q], far=.02)   # no errors at all: every shuffle ties
    assert F.chance_level(same, p, q, n=19).loc["FNMR gap", "p"] == 1


def test_weighted_fairness_is_repetition():
    s, y, a, b = groups(5)
    w = rng(0, "w").integers(0, 3, len(s)).astype(float)
    k = np.repeat(np.arange(len(s)), w.astype(int))
    weighted, repeated = F._counts(a, b, y, s >= .3, 4, w), F._counts(a[k], b[k], y[k], s[k] >= .3, 4)
    for x, z in zip(weighted, repeated): assert np.array_equal(x, z)


def test_fairness_edges():
    s, y, a, b = groups(3)
    lone = F.fairness(s[~(y & (a == 2))], y[~(y & (a == 2))], a[~(y & (a == 2))], b[~(y & (a == 2))])
    assert math.isnan(lone.table.FNMR["2"]) and "No genuine pairs within: 2" in lone.note and np.isfinite(float(lone.summary["FDR"]))
    empty = F.fairness(s, y, a, b, threshold=9.)                           # nobody gets in
    assert float(empty.summary["FMR Gini (FPD)"]) == 0 and math.isnan(empty.summary["FMR ratio"]) and math.isnan(empty.summary["IR"]) and np.isfinite(float(empty.summary["IR smoothed"]))
    for bad in (lambda: F.fairness(s, y, a*0, b*0), lambda: F.fairness(s, y, a[:-1], b), lambda: F.fairness(s, y, [None]*len(s), b*0), lambda: F.fairness(s, y, a, b, threshold=np.nan), lambda: F.fairness(s, y, a, b, alpha=2),
                lambda: F.fairness(s, y, a, b, id_a=a), lambda: F.fairness(s*np.nan, y, a, b), lambda: F.gini([.5]), lambda: F.fdr([.1, .2], [.1, 1.2]), lambda: F.ser([99.1, 98.2]), lambda: F.fdr([.1, .2, .3], [.1, .2]), lambda: F.garbe(dict(a=.1, b=.2), dict(a=.1, c=.2))):
        with pytest.raises((DataError, ConfigError)): bad()
    import pandas as pd
    ages = pd.Categorical(np.array(["20-30", "3-10", "60+"])[a % 3], categories=["3-10", "20-30", "60+"], ordered=True)
    assert F.fairness(s, y, ages, ages).groups == ["3-10", "20-30", "60+"]
    assert F.fairness(s, y, a*10 + 5, b*10 + 5).groups == ["5", "15", "25", "35"]
    assert "nan" not in F.fairness(s, y, np.where(a == 0, np.nan, a), np.where(b == 0, np.nan, b)).groups


def test_chance_level_finds_nothing_where_nothing_is():
    p_values = []
    for seed in range(12):
        s, y, p, q = population(seed, people=24, per=4)
        group = rng(seed, "meaningless").permutation(np.repeat(["x", "y", "z"], 8))
        r = F.fairness(s, y, group[p], group[q], far=.02)
        p_values.append(F.chance_level(r, p, q, n=39).loc["FNMR gap", "p"])
    assert .2 < np.mean(p_values) < .8 and np.mean(np.array(p_values) <= .05) <= .25
    s, y, p, q = population(0, people=24, per=4)
    group = np.repeat(["x", "y"], 12)
    r = F.fairness(np.where(y & (group[p] == "y"), s - .6, s), y, group[p], group[q], far=.02)
    assert F.chance_level(r, p, q, n=39).loc["FNMR gap", "p"] < .05


def test_fairness_intervals_hold_the_value_mostly():
    s, y, p, q = population(4, people=40, per=4)
    group = np.repeat(["x", "y"], 20)
    r = F.fairness(s, y, group[p], group[q], far=.02, id_a=p, id_b=q, n=60)
    rate = r.summary["FNMR gap"]
    assert rate.low < rate.high and len(rate.samples) == 60 and "FNMR gap" in r._repr_html_()
    again = F.fairness(s, y, group[p], group[q], far=.02, id_a=p, id_b=q, n=60)
    assert np.array_equal(again.summary["FNMR gap"].samples, rate.samples)


# ---- pictures --------------------------------------------------------------------------------------------------------

def test_pictures_take_axes_and_degenerate_data():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    s, y, a, b = groups()
    for scores, labels in ((s, y), (np.full(4, .2), [1, 0, 1, 0]), ([.9, .1], [1, 0])):
        fig, axes = plt.subplots(1, 3)
        assert V.plot_scores(scores, labels, axes[0], threshold=.2) is axes[0]
        assert V.roc(scores, labels).plot(axes[1]) is axes[1] and V.det(scores, labels).plot(axes[2]) is axes[2]
        V.VerificationReport(scores, labels, folds=None).plot(); fig.canvas.draw()
    r = F.fairness(s, y, a, b, far=.02)
    ax = r.plot_det(); r.plot_cross(); r.plot(); F.fairness(s, y, a, b, threshold=9.).plot_cross()
    C.Confusion(tp=0, fn=0, fp=0, tn=0).plot(); V.kfold_accuracy(s, y).plot()
    ax.figure.canvas.draw(); plt.close("all")


def test_a_thinned_curve_keeps_its_ends_and_lies_on_the_curve():
    s, y = scored(0, n=50000)
    curve = V.roc(s, y); few = curve.frame(200)
    assert len(few) <= 200 and few.far.max() == 1 and few.tar.max() == 1 and few.far.min() == 0
    full = set(zip(curve.far, curve.tar))
    assert all(pair in full for pair in zip(few.far, few.tar))
    for far in (1e-3, 1e-2, .1):                                           # thinning loses little
        assert few[few.far <= far].tar.max() > V.tar_at_far(curve, far=far) - .03


# ---- real faces ------------------------------------------------------------------------------------------------------

def lfw_pairs(name):
    "Image names and labels of an LFW protocol file, in its order."
    folder, same, pairs = data_dir("lfw"), [], []
    for line in (folder/name).read_text().splitlines()[1:]:
        f = line.split("\t")
        same.append(len(f) == 3)
        (n1, i1), (n2, i2) = ((f[0], f[1]), (f[0], f[2])) if len(f) == 3 else ((f[0], f[1]), (f[2], f[3]))
        pairs.append((f"{n1}/{n1}_{int(i1):04d}.jpg", f"{n2}/{n2}_{int(i2):04d}.jpg"))
    return np.array(pairs), np.array(same)


@pytest.mark.skipif(data_dir("lfw") is None or models_dir() is None, reason="real faces: HYPERFACE_DATA with lfw/ and HYPERFACE_MODELS are not set")
def test_lfw_600_pairs():
    formats, embed = pytest.importorskip("hyperface.data.formats"), pytest.importorskip("hyperface.extraction.embed")
    pairs, same = lfw_pairs("pairs_600.txt")
    names, code = np.unique(pairs, return_inverse=True); code = code.reshape(pairs.shape)
    records = formats.read_lfw(data_dir("lfw"))
    row = {name: k for k, name in enumerate(records.table["image"])}
    embeddings = embed.embed_records(records.select(np.array([row[n] for n in names])), embed.load_embedder(str(find_model("w600k_mbf_dequant_fp32.onnx")))).vectors
    s = V.pair_scores(embeddings[code[:, 0]], embeddings[code[:, 1]])
    lfw, insight = V.kfold_accuracy(s, same), V.kfold_accuracy(s, same, protocol="insightface")
    assert abs(lfw - .9983) < .0035 and abs(insight - .9983) < .0035 and V.auc(s, same) > .998


def test_the_paired_change_is_the_mean_over_trainings_under_the_same_draws():
    r = np.random.default_rng(5)
    p, q = r.integers(40, size=(2, 3000)); y = p == q; y[:600] = True; q = np.where(y, p, q)
    g, h = p % 2, q % 2
    base = y*1. + r.normal(size=(3, len(y)))*.6
    judge = lambda s: F.fairness(s, y, g, h, far=.05, id_a=p, id_b=q, n=30, seed=2)
    before, after = [judge(s) for s in base[:2]], [judge(base[2])]
    found = F.paired_fairness(before, after)
    weights = list(V.identity_weights(p, q, 30, 2))
    def rate(s, w):
        t = V.tar_at_far(V.SortedPairs(s, y).curve(w), far=.05, interval=None).threshold
        inside = y & (g == 1)
        return (w*(inside & (s < t))).sum()/(w*inside).sum()
    each = np.array([rate(base[2], w) - (rate(base[0], w) + rate(base[1], w))/2 for w in weights])
    row = found.loc[("FNMR", "1")]
    assert [row.low, row.high] == pytest.approx(np.quantile(each, [.025, .975]))
    assert row.change == pytest.approx(rate(base[2], np.ones(len(y))) - np.mean([rate(s, np.ones(len(y))) for s in base[:2]]))
    same = F.paired_fairness(before, before)
    assert (same[["change", "low", "high"]].dropna() == 0).all(None)
    for bad in (F.fairness(base[0], y, h, g, far=.05, id_a=p, id_b=q, n=30, seed=3), F.fairness(base[0][::-1], y[::-1], g[::-1], h[::-1], far=.05, id_a=p[::-1], id_b=q[::-1], n=30, seed=2)):
        with pytest.raises(DataError, match="other pairs"): F.paired_fairness(before, bad)

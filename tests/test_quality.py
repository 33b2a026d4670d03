"Noise measures and generation metrics: against naive loops and other libraries, planted faults, hostile input, real faces."
import io
import tracemalloc

import numpy as np
import pytest
from scipy import linalg

from hyperface.core import ConfigError, DataError, data_dir, models_dir, rng
from hyperface.metrics import generation as G, quality as Q


def people(n=60, per=8, sigma=.8, dim=256, seed=0):
    gen = rng(seed, "test people")
    centre = gen.standard_normal((n, dim)); centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    x = np.repeat(centre, per, 0) + gen.standard_normal((n*per, dim))*sigma/np.sqrt(dim)
    return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), np.repeat(np.arange(n), per)


# ---- searches -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [1, 7, 64, 5000])
def test_similar_pairs_is_the_brute_force_answer(block):
    x, _ = people(12, 5)
    s = x.astype(np.float64) @ x.T.astype(np.float64)
    want = {(i, j) for i in range(60) for j in range(i + 1, 60) if s[i, j] >= .55}
    got = Q.similar_pairs(x, .55, block=block)
    assert set(zip(got.a, got.b)) == want and got.attrs["total"] == len(want)
    assert (np.diff(got.cosine) <= 0).all()
    cross = Q.similar_pairs(x[:20], .55, other=x[20:], block=block)
    assert set(zip(cross.a, cross.b + 20)) == {(i, j) for i, j in np.argwhere(s >= .55) if i < 20 <= j}


def test_limit_keeps_the_most_similar_and_counts_all():
    x, _ = people(10, 10)
    every, few = Q.similar_pairs(x, .3, block=16), Q.similar_pairs(x, .3, block=16, limit=9)
    assert len(few) == 9 and few.attrs["total"] == len(every)
    assert few[["a", "b"]].equals(every[["a", "b"]].head(9))


def test_a_pair_exactly_at_the_threshold_counts():
    x = np.array([[1, 0], [.6, .8], [0, 1]], np.float64)                     # cosines .6, 0, .8
    assert len(Q.similar_pairs(x, np.float32([1, 0]) @ np.float32([.6, .8]))) == 2
    assert len(Q.near_duplicates(np.ones((3, 4)), threshold=1.)) == 3


@pytest.mark.parametrize("k, block", [(1, 3), (4, 10), (50, 17)])
def test_nearest_is_the_brute_force_answer(k, block):
    x, y = people(7, 3)[0], people(10, 5, seed=1)[0]
    s = x @ y.T
    index, score = Q.nearest(x, y, k, block)
    np.testing.assert_allclose(score, -np.sort(-s, 1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(s, index, 1), score, atol=1e-6)
    assert all(len(set(row)) == k for row in index)


def test_memory_stays_bounded():
    x, identity = people(3000, 4, dim=64)
    tracemalloc.start()
    Q.noise_report(x, identity, max_pairs=200_000)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 250e6 < 4*len(x)**2                                       # the whole matrix has 576 MB


# ---- distributions ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gap, sg, si", [(.5, .1, .08), (.2, .1, .1), (0., .1, .1), (.3, .05, .15)])
def test_overlap_of_two_normals(gap, sg, si):
    from scipy.stats import norm
    gen = rng(3, gap)
    s = Q.separability(Q.count_scores(np.clip(gen.normal(gap, sg, 30_000), -1, 1), np.clip(gen.normal(0, si, 60_000), -1, 1)))
    x = np.linspace(-1, 1, 100_001)
    assert s.overlap_rate == pytest.approx(np.minimum(norm.pdf(x, gap, sg), norm.pdf(x, 0, si)).sum()*2e-5, abs=.015)


def test_eer_and_auc_agree_with_scikit_learn():
    from sklearn.metrics import roc_auc_score, roc_curve
    gen = rng(4)
    g, i = np.clip(gen.normal(.35, .15, 3000), -1, 1), np.clip(gen.normal(.05, .1, 20_000), -1, 1)
    s, y = np.r_[g, i], np.r_[np.ones(3000), np.zeros(20_000)]
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    k = np.argmin(np.abs(fpr - (1 - tpr)))
    ours = Q.separability(Q.count_scores(g, i))
    from hyperface.metrics.verification import auc, eer
    assert ours.eer_rate == pytest.approx(float(eer(s, y)), abs=3e-4) and ours.auc_score == pytest.approx(float(auc(s, y)), abs=2e-4)
    assert ours.eer_rate == pytest.approx((fpr[k] + 1 - tpr[k])/2, abs=5e-4)
    assert ours.auc_score == pytest.approx(roc_auc_score(y, s), abs=2e-4)
    assert ours.overlap_rate <= 2*ours.eer_rate + .01


def test_histograms_count_every_pair_whatever_the_block():
    x, identity = people(20, 6); identity = rng(0).permutation(identity)
    one, two = (Q.similarity_distributions(x, identity, max_pairs=None, block=b) for b in (13, 10_000))
    assert one.genuine.sum() == 20*15 and one.impostor.sum() == 120*119//2 - 300
    for kind in ("genuine", "impostor"): assert one.mean_std(kind) == pytest.approx(two.mean_std(kind), abs=1e-7)
    upper = np.triu_indices(120, 1); s = (x @ x.T)[upper]; same = (identity[:, None] == identity)[upper]
    assert one.mean_std("impostor") == pytest.approx((s[~same].mean(), s[~same].std()), abs=1e-6)


def test_drawn_pairs_are_unbiased():
    x, identity = people(40, 3)
    identity = np.where(identity < 10, 0, identity)                          # one large folder
    every, drawn = Q.similarity_distributions(x, identity, max_pairs=None), Q.similarity_distributions(x, identity, max_pairs=400, seed=5)
    assert drawn.sampled and drawn.genuine.sum() == 400
    for kind in ("genuine", "impostor"):
        (m, s), (d, _) = every.mean_std(kind), drawn.mean_std(kind)
        assert abs(m - d) < 4*s/400**.5


# ---- findings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_planted_faults_are_found_and_nothing_else(seed):
    x, identity = people(80, 9, seed=seed)
    e, label, truth = Q.plant_faults(x, identity, wrong_folder=25, split=8, copies=15, seed=seed)
    r = Q.noise_report(e, label, max_pairs=10_000)
    pairs = lambda t, a="a", b="b": [tuple(sorted(map(str, p))) for p in zip(t[a], t[b])]
    assert Q.precision_recall_of(r.outliers["index"], truth["wrong_folder"]) == (1, 1)
    assert Q.precision_recall_of(pairs(r.same_person), [tuple(sorted(map(str, p))) for p in truth["split"]]) == (1, 1)
    assert Q.precision_recall_of(zip(r.duplicates.a, r.duplicates.b), truth["copies"]) == (1, 1)
    belongs = r.outliers.set_index("index").belongs_to
    assert np.mean([str(belongs[i]).split(" (")[0] == str(identity[i]) for i in truth["wrong_folder"]]) == 1


def test_strangers_do_not_hide_behind_each_other():
    "A folder with four strangers of one kind among ten: a single pass is pulled towards them, the second is not."
    x, identity = people(40, 10)
    label = identity.copy(); label[10:14] = 0
    found = Q.intra_class_noise(x, label)
    assert set(found["index"]) == {10, 11, 12, 13} and set(found.belongs_to) == {1}


def test_leave_one_out_is_the_naive_answer():
    x, identity = people(6, 5)
    ours = Q.cosine_to_identity(x, identity)
    for i in range(len(x)):
        rest = x[(identity == identity[i]) & (np.arange(len(x)) != i)].astype(np.float64).sum(0)
        assert ours[i] == pytest.approx(x[i] @ rest/np.linalg.norm(rest), abs=1e-6)


def test_references_are_used_where_given():
    x, identity = people(6, 5)
    wanted = {c: x[identity == c][0] for c in range(6)}
    np.testing.assert_allclose(Q.cosine_to_identity(x, identity, wanted), [x[i] @ wanted[identity[i]] for i in range(30)], atol=1e-6)
    with pytest.raises(DataError, match="lacks 1"): Q.cosine_to_identity(x, identity, {c: wanted[c] for c in range(5)})


def test_correction_finds_split_people_in_small_folders_and_no_others():
    x, _ = people(300, 4, sigma=1.2)
    label = np.array([f"{i//4}{'ab'[i % 4//2]}" for i in range(len(x))])
    found = Q.inter_class_noise(x, label, corrected=True)
    right = [a[:-1] == b[:-1] for a, b in zip(found.a, found.b)]
    assert sum(right) >= 285 and all(right)
    assert len(Q.inter_class_noise(x, label)) < 30                           # the printed rule


@pytest.mark.parametrize("per", [2, 3, 6])
def test_misfiled_pictures_do_not_merge_folders(per):
    x, identity = people(200, per, sigma=.9)
    e, label, truth = Q.plant_faults(x, identity, wrong_folder=len(x)//10, seed=2)
    assert len(Q.inter_class_noise(e, label, corrected=True)) <= 3


def test_chance_level_of_the_leakage_test():
    gen = rng(8)
    x, y = gen.standard_normal((4000, 128)), gen.standard_normal((3000, 128))
    leak = Q.leakage(x, y, chance=.02)
    assert leak.rate == pytest.approx(.02, abs=.012) and leak.chance == pytest.approx(.02, abs=1e-6)
    assert Q.leakage(x, np.r_[y, x[:40] + .1*gen.standard_normal((40, 128))]).table["index"].isin(range(40)).sum() == 40


def test_uniqueness_consistency_diversity_extremes():
    x, identity = people(30, 6)
    assert Q.uniqueness(np.eye(40)) == 1 and Q.uniqueness(np.ones((40, 3))) == 1/40
    assert Q.consistency(x, identity) == 1 and Q.consistency(x, rng(0).permutation(identity)) < .3
    s = rng(1).standard_normal((100, 3))
    assert Q.diversity(np.tile(s, (2, 1)), np.repeat([0, 1], 100), s) == 1 and Q.diversity(np.zeros((10, 3)), np.zeros(10), s) == 0


BAD = {"nan": lambda x, y: (np.where(np.arange(len(x))[:, None] == 3, np.nan, x), y), "inf": lambda x, y: (np.where(np.arange(len(x))[:, None] == 3, np.inf, x), y),
    "zero row": lambda x, y: (x*(np.arange(len(x)) != 3)[:, None], y), "one dimension": lambda x, y: (x[0], y[:1]), "empty": lambda x, y: (x[:0], y[:0]),
    "strings": lambda x, y: (x.astype(str), y), "complex": lambda x, y: (x.astype(complex), y), "too few labels": lambda x, y: (x, y[:-1]),
    "none label": lambda x, y: (x, [None, *y[1:].tolist()]), "nan label": lambda x, y: (x, np.where(np.arange(len(y)) == 0, np.nan, y)), "labels in a square": lambda x, y: (x, np.stack([y, y]))}

@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused(fault):
    x, y = BAD[fault](*people(5, 4))
    with pytest.raises(DataError): Q.noise_report(x, y)


def test_senseless_settings_are_refused():
    x, y = people(5, 4)
    for call in (lambda: Q.similar_pairs(x, np.nan), lambda: Q.similar_pairs(x, .5, limit=0), lambda: Q.similar_pairs(x, .5, block=0), lambda: Q.similar_pairs(x, 30),
                 lambda: Q.noise_report(x, y, outlier=np.nan), lambda: Q.noise_report(x, y, same_person=70), lambda: Q.noise_report(x, y, max_pairs=0), lambda: Q.nearest(x, x, k=0), lambda: Q.uniqueness(x, "0.7"),
                 lambda: Q.leakage(x, x, threshold=2), lambda: Q.leakage(x, x, chance=0)):
        with pytest.raises((ConfigError, DataError)): call()
    with pytest.raises(DataError, match="size of the gallery"): Q.nearest(x, x[:3], k=4)


def test_all_pictures_alike():
    r = Q.noise_report(np.ones((12, 8)), np.repeat([0, 1], 6))
    assert r["overlap_rate"] == pytest.approx(1, abs=1e-6) and r["eer_rate"] == pytest.approx(.5) and r["near_duplicate_rate"] == 1 and r["uniqueness_rate"] == .5
    assert len(r.same_person) == 1 and len(r.outliers) == 0


def test_awkward_but_legal_input():
    x, y = people(5, 4)
    a, b = Q.noise_report(x, y).summary, Q.noise_report((x*np.linspace(1, 21.9, 20)[:, None]).tolist(), [f"p{i}" for i in y]).summary
    np.testing.assert_allclose(a.value, b.value, atol=1e-5)                  # lists, strings and un-normalised features
    lonely = Q.noise_report(x[::4], np.arange(5))                            # one picture each
    assert np.isnan(lonely["eer_rate"]) and np.isnan(lonely["intra_class_noise_rate"]) and len(lonely.outliers) == 0
    single = Q.noise_report(x[:4], np.zeros(4))                              # one identity
    assert np.isnan(single["eer_rate"]) and single["inter_class_noise_rate"] == 0 and single["uniqueness_rate"] == 1
    assert np.isfinite(Q.noise_report(x[:2], [0, 1])["impostor_mean"])
    with pytest.raises(DataError, match="cancel"): Q.noise_report(np.array([[1., 0], [-1, 0], [0, 1]]), [0, 0, 1])


def test_report_is_saved_and_read_again(tmp_path):
    from hyperface.core import read_json
    x, y = people(10, 5)
    report = Q.noise_report(x, y, training=people(5, 5, seed=3)[0])
    back = read_json(report.save(tmp_path/"noise.json"))
    assert back["summary"]["pictures"] == 50 and sum(back["histogram"]["genuine"]) == 100 and "leaks" in back
    assert "<table" in report._repr_html_() and "eer_rate" in repr(report)


def test_real_faces():
    "Faults planted in LFW folders, and copies made by a JPEG encoder, seen by a real recogniser."
    if data_dir("lfw") is None or models_dir() is None: pytest.skip("HYPERFACE_DATA and HYPERFACE_MODELS are not set")
    from PIL import Image
    from hyperface.extraction.embed import load_embedder
    folders = [f for f in sorted((data_dir("lfw")/"lfw112").iterdir()) if f.is_dir() and 8 <= len(list(f.glob("*.jpg"))) <= 12][:16]
    pictures, label = [], []
    for f in folders:
        for p in sorted(f.glob("*.jpg"))[:8]: pictures.append(Image.open(p).convert("RGB")); label.append(f.name)
    copied = list(range(3, len(pictures), 13))
    for i in copied:
        buffer = io.BytesIO(); pictures[i].save(buffer, "JPEG", quality=60); pictures.append(Image.open(buffer).convert("RGB")); label.append(label[i])
    images = (np.stack([np.asarray(p) for p in pictures]).transpose(0, 3, 1, 2)/127.5 - 1).astype(np.float32)
    x = np.asarray(load_embedder("w600k_mbf_dequant_fp32.onnx").embed(images))
    n = len(pictures) - len(copied)
    e, l, truth = Q.plant_faults(x[:n], label[:n], wrong_folder=8, split=4, seed=1)
    e, l = np.r_[e, x[n:]], np.r_[l, [l[i] for i in copied]]
    r = Q.noise_report(e, l)
    wrong = set(truth["wrong_folder"]) | {n + k for k, i in enumerate(copied) if i in truth["wrong_folder"]}
    assert Q.precision_recall_of(r.outliers["index"], wrong) == (1, 1)
    pairs = lambda t: [tuple(sorted(p)) for p in zip(t.a, t.b)]
    assert Q.precision_recall_of(pairs(r.same_person), truth["split"]) == (1, 1)
    assert Q.precision_recall_of(pairs(Q.inter_class_noise(e, l)), truth["split"]) == (1, .75)    # the printed rule: means of four are noisy
    found = set(zip(r.duplicates.a, r.duplicates.b))
    assert {(i, n + k) for k, i in enumerate(copied)} <= found and len(found) <= len(copied) + 6  # LFW has near-duplicates of its own
    clean = Q.noise_report(x[:n], label[:n])
    assert clean["eer_rate"] < .02 and clean["inter_class_noise_rate"] == 0 and r["overlap_rate"] > clean["overlap_rate"]


# ---- generation ---------------------------------------------------------------------------------------------------

def naive_fid(a, b):
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0))**2).sum() + np.trace(s1) + np.trace(s2) - 2*np.trace(linalg.sqrtm(s1 @ s2).real)


@pytest.mark.parametrize("n, m, d", [(500, 300, 64), (2000, 100, 16), (65, 400, 64)])
def test_frechet_agrees_with_sqrtm(n, m, d):
    gen = rng(0, n); mix = gen.standard_normal((d, d))/np.sqrt(d)
    a, b = gen.standard_normal((n, d)) @ mix, gen.standard_normal((m, d)) + .3
    assert G.frechet_distance(a, b) == pytest.approx(naive_fid(a, b), rel=1e-6)


def test_frechet_with_fewer_rows_than_columns():
    "Against the exact nuclear norm of the centred features, which needs no covariance."
    gen = rng(1); a, b = gen.standard_normal((40, 200)), 1.5*gen.standard_normal((60, 200))
    ca, cb = (a - a.mean(0))/np.sqrt(39), (b - b.mean(0))/np.sqrt(59)
    exact = ((a.mean(0) - b.mean(0))**2).sum() + (ca**2).sum() + (cb**2).sum() - 2*np.linalg.norm(ca @ cb.T, "nuc")
    assert G.frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)
    assert G.frechet_distance(a, a) < 1e-9 and G.frechet_distance(a, a[::-1]) < 1e-9


def test_frechet_invariances():
    gen = rng(2); a, b = gen.standard_normal((300, 20)), gen.standard_normal((200, 20))*1.3
    q = np.linalg.qr(gen.standard_normal((20, 20)))[0]; base = G.frechet_distance(a, b)
    assert G.frechet_distance(b, a) == pytest.approx(base, rel=1e-9)
    assert G.frechet_distance(a @ q + 100, b @ q + 100) == pytest.approx(base, rel=1e-8)
    assert G.frechet_distance(3*a, 3*b) == pytest.approx(9*base, rel=1e-9)
    assert G.frechet_distance(a + np.eye(20)[0]*5, a) == pytest.approx(25, rel=1e-9)


def test_moments_add_up():
    x = rng(3).standard_normal((1000, 8)) + 1e4
    whole, parts = G.FeatureMoments.of(x), G.FeatureMoments.of(np.array_split(x, 13))
    np.testing.assert_allclose(parts.covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(whole.mean, x.mean(0)); assert parts.n == 1000


def test_lists_of_rows_and_of_blocks():
    x = rng(3).standard_normal((40, 3))
    assert G.frechet_distance(x.tolist(), x) == pytest.approx(0, abs=1e-9) and G.FeatureMoments.of([x[:7], x[7:]]).n == 40
    for bad in ([], (), np.float64(3), [1., 2.], [[]]):
        with pytest.raises(DataError): G.frechet_distance(bad, x)


def test_jackknife_removes_the_bias_where_it_is_all_there_is():
    "D = 96 and 200 pictures: measured 36 on average where the truth is 0."
    found = [G.frechet_interval(*rng(s, "bias").standard_normal((2, 200, 96)), groups=10, seed=s) for s in range(8)]
    assert np.mean([i.value for i in found]) > 20
    assert abs(np.mean([i.corrected for i in found])) < 1.5
    assert np.mean([i.low <= 0 <= i.high for i in found]) >= .75


def test_groups_keep_identities_together():
    label = np.repeat(np.arange(30), 7)
    group = G._in_groups(210, label, 10, rng(0))
    assert all(len(set(group[label == c])) == 1 for c in range(30)) and set(np.bincount(group)) == {21}


def test_mmd_agrees_with_scikit_learn():
    from sklearn.metrics.pairwise import polynomial_kernel
    gen = rng(5); x, y = gen.standard_normal((150, 32)), gen.standard_normal((90, 32)) + .2
    k = lambda a, b: polynomial_kernel(a, b, degree=3, gamma=1/32, coef0=1)
    xx, yy = k(x, x), k(y, y)
    want = (xx.sum() - np.trace(xx))/(150*149) + (yy.sum() - np.trace(yy))/(90*89) - 2*k(x, y).mean()
    assert G.polynomial_mmd(x, y, block=31) == pytest.approx(want, rel=1e-9)
    assert G.kernel_distance(x, y, subsets=30, size=60, seed=1).equals(G.kernel_distance(x, y, subsets=30, size=60, seed=1))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_agrees_with_scikit_learn(k):
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors
    gen = rng(6); real, fake = gen.standard_normal((220, 10)), gen.standard_normal((170, 10))*.8 + .2
    radius = lambda x: NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]
    d, rr, ff = pairwise_distances(real, fake), radius(real), radius(fake)
    want = [(d <= rr[:, None]).any(0).mean(), (d <= ff).any(1).mean(), (d <= rr[:, None]).sum()/k/170, (d.min(1) <= rr).mean()]
    np.testing.assert_allclose(G.prdc(real, fake, k, block=37), want, atol=1e-12)


def test_prdc_with_copies_and_far_from_the_origin():
    gen = rng(7); real = gen.standard_normal((120, 6))
    same = G.prdc(real + 1e5, real + 1e5, 3)
    assert list(same[["precision_rate", "recall_rate", "coverage_rate"]]) == [1, 1, 1]
    assert list(G.prdc(np.zeros((20, 3)), np.zeros((20, 3)), 3)[:2]) == [1, 1]
    apart = G.prdc(real, real + 1e3, 3)
    assert list(apart) == [0, 0, 0, 0]
    twice = np.repeat(real[:30], 4, 0)                                       # radius 0 for k = 3: only the points themselves
    assert G.prdc(twice, twice + 1e-6, 3).precision_rate == 0


@pytest.mark.parametrize("call", [G.frechet_distance, G.polynomial_mmd, G.kernel_distance, G.prdc, G.generation_report, G.frechet_interval, G.frechet_extrapolated])
def test_bad_features_are_refused(call):
    x = rng(9).standard_normal((30, 5)); bad = x.copy(); bad[4, 2] = np.nan
    for a, b in ((bad, x), (x, bad), (x[:, 0], x), (x, x[:0]), (x, x[:, :4]), (x[:1], x), (x.astype(str), x), (x, x*1e300)):
        with pytest.raises(DataError): call(a, b)

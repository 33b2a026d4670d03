"""Chapter 3 against brute force, other formulas and faults: what its notebooks are the wrong place for."""
from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperface.core import ConfigError, DataError
from hyperface.sphere import bounds, codes, geometry, orbits, packing, sampling


@pytest.fixture(autouse=True)
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---- geometry ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_unit_accepts_number_types_and_keeps_directions(dtype):
    x = (draws(20, 7) * 10).astype(dtype)
    x[:, 0] = 3
    y = geometry.unit(x)
    assert y.dtype in (np.float32, np.float64)
    np.testing.assert_allclose(y, x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), atol=1e-6)


def test_unit_survives_extreme_lengths():
    for scale in (1e-160, 1e-300, 1e160, 1e300):
        np.testing.assert_allclose(geometry.unit(np.array([[3., 4.]]) * scale), [[.6, .8]], rtol=1e-12)
    np.testing.assert_allclose(geometry.unit(np.float32([[3e30, 4e30]])), [[.6, .8]], rtol=1e-6)


@pytest.mark.parametrize("bad, message", [([[1, 2], [0, 0]], "Row 1"), ([[1, np.inf]], "Row 0"), (np.zeros((2, 0)), "shape"), (np.zeros((2, 2, 2)), "shape"),
                                          ([["a", "b"]], "real numbers"), (np.ones((2, 2), complex), "real numbers"), (3., "shape")])
def test_unit_refuses(bad, message):
    with pytest.raises(DataError, match=message):
        geometry.unit(bad)


def test_bad_row_beyond_the_first_piece_is_named():
    x = np.ones((40_000, 2), np.float32)
    x[33_333] = np.nan
    with pytest.raises(DataError, match="Row 33333"):
        geometry.unit(x)


@pytest.mark.parametrize("theta", [0, 1e-300, 1e-12, 1e-7, .1, 1, math.pi / 2, 3, math.pi - 1e-9])
def test_angle_is_accurate_everywhere(theta):
    x = np.array([[1., 0, 0]])
    assert geometry.angle(x, [[math.cos(theta), math.sin(theta), 0]])[0] == pytest.approx(theta, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("n, d, block", [(2, 3, 4096), (3, 1, 4096), (257, 5, 64), (1000, 64, 300), (1000, 64, 1)][:4])
def test_nearest_neighbours_equal_brute_force(n, d, block):
    x = geometry.unit(draws(n, d))
    near, who = geometry.nearest_neighbours(x, block=block)
    full = np.stack([geometry.angle(x, x[i]) for i in range(n)])
    np.fill_diagonal(full, np.inf)
    np.testing.assert_allclose(near, full.min(1), atol=1e-6)
    np.testing.assert_allclose(near, full[np.arange(n), who], atol=1e-12)
    assert near.min() == pytest.approx(full.min(), abs=1e-9)


def test_nearest_neighbours_between_two_sets_and_with_groups():
    x, y = geometry.unit(draws(50, 8)), geometry.unit(draws(70, 8, seed=1))
    near, who = geometry.nearest_neighbours(x, y, block=32)
    full = np.arccos(x @ y.T)
    np.testing.assert_allclose(near, full.min(1), atol=1e-7)
    assert (who == full.argmin(1)).all()
    gx, gy = np.arange(50) % 3, np.arange(70) % 3
    near, who = geometry.nearest_neighbours(x, y, groups=(gx, gy), block=32)
    assert (gx != gy[who]).all()
    np.testing.assert_allclose(near, np.where(gx[:, None] == gy, 9, full).min(1), atol=1e-7)


def test_all_in_one_group_has_no_neighbour():
    near, who = geometry.nearest_neighbours(draws(5, 3), groups=[1] * 5)
    assert np.isnan(near).all() and (who == -1).all()


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-9])
def test_tight_cluster_is_measured_exactly(spread):
    "All points within a spread that float32 cosines cannot resolve."
    d = 32
    x = np.concatenate([np.ones((300, 1)), spread * draws(300, d - 1)], 1)
    near, _ = geometry.nearest_neighbours(x)
    flat = x[:, 1:]
    exact = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(-1))
    np.fill_diagonal(exact, np.inf)
    np.testing.assert_allclose(near, exact.min(1), rtol=3e-3 if spread > 1e-4 else 2e-5)


def test_exact_copies_have_angle_zero():
    x = np.repeat(draws(40, 16).astype(np.float32), 3, axis=0)
    near, who = geometry.nearest_neighbours(x)
    assert (near < 1e-7).all() and (np.arange(120) // 3 == who // 3).all()


def test_antipodal_points():
    near, who = geometry.nearest_neighbours([[1., 0], [-1, 1e-8]])
    assert near[0] == pytest.approx(math.pi - 1e-8, abs=1e-15) and list(who) == [1, 0]


def test_statistics_by_hand():
    z = geometry.unit(draws(90, 6))
    who = np.array(list("abc") * 30)
    s = geometry.embedding_statistics(z * 3, who)
    means = np.stack([z[who == c].mean(0) for c in "abc"])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cos = means @ means.T
    off = cos[~np.eye(3, dtype=bool)]
    assert s.inter_class_distance == pytest.approx(1 - off.mean(), abs=1e-12)
    assert s.min_angle_deg == pytest.approx(math.degrees(math.acos(off.max())), abs=1e-9)
    angles = {c: np.degrees(np.arccos(np.clip(z[who == c] @ m, -1, 1))) for c, m in zip("abc", means)}
    assert s.intra_class_angle_deg == pytest.approx(np.mean([a.mean() for a in angles.values()]), abs=1e-9)
    assert s.intra_class_variance_deg2 == pytest.approx(np.mean([(a ** 2).mean() for a in angles.values()]), rel=1e-9)
    full = z @ z.T
    assert s.inter_sample_distance == pytest.approx(1 - full[who[:, None] != who].mean(), abs=1e-12)
    assert s.norm_mean == pytest.approx(3) and (s.n, s.classes, s.dim) == (90, 3, 6)
    assert "Average inter-class cosine distance" in s._repr_html_()


def test_statistics_do_not_depend_on_the_order_of_rows():
    z, who = draws(200, 12), np.random.default_rng(3).integers(0, 40, 200)
    p = np.random.default_rng(4).permutation(200)
    a, b = geometry.embedding_statistics(z, who), geometry.embedding_statistics(z[p], who[p])
    for key, value in a.as_dict().items():
        other = b.as_dict()[key]
        assert set(value) == set(other) if key == "closest" else value == pytest.approx(other, rel=1e-9), key


def test_statistics_escape_labels_and_dump_to_json(tmp_path):
    from hyperface.core import write_json
    s = geometry.embedding_statistics(np.eye(2), ["<script>", "b"])
    assert "<script>" not in s._repr_html_()
    write_json(tmp_path / "s.json", s.as_dict())


def test_hundred_thousand_rows_in_bounded_memory():
    "Peak memory beyond the vectors stays near the block, not n x n (here 30,000 x 64: the table would take 3.6 GB)."
    code = """
import resource, numpy as np, torch
torch.set_num_threads(1)
from hyperface.sphere.geometry import nearest_neighbours
x = np.random.default_rng(0).standard_normal((30000, 64)).astype(np.float32)
nearest_neighbours(x[:3000], block=2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_neighbours(x, block=2048)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**__import__("os").environ, "HYPERFACE_PROGRESS": "0"})
    assert out.returncode == 0, out.stderr
    assert float(out.stdout.split()[-1]) < 250


# ---- bounds -----------------------------------------------------------------------------------------------------------------------
def test_levenshtein_is_the_best_of_neighbouring_degrees():
    "At the size where the degree changes both formulas agree."
    for d in (3, 8, 24, 512):
        for m in range(2, 8):
            n = bounds.design_size(d, m + 1)
            if n > 1e9:
                break
            s = bounds.levenshtein_bound(n, d).cos
            assert bounds.levenshtein_size(s - 1e-12, d, m) == pytest.approx(n, rel=1e-5)
            assert bounds.levenshtein_size(s + 1e-12, d, m + 1) == pytest.approx(n, rel=1e-5)


def test_jacobi_zeros_against_scipy():
    from scipy.special import roots_jacobi
    for k, a, b in ((1, 0, 0), (2, .5, .5), (5, 1, 0), (9, 254.5, 255.5), (40, 0, 1), (7, -.5 + 1, -.5 + 1)):
        assert bounds.jacobi_top(k, a, b) == pytest.approx(roots_jacobi(k, a, b)[0].max(), abs=1e-10)


def test_gegenbauer_against_scipy():
    from scipy.special import eval_gegenbauer
    for d in (3, 4, 9, 512):
        lam = (d - 2) / 2
        for s in (-.7, 0., .02, .9):
            want = [eval_gegenbauer(k, lam, s) / eval_gegenbauer(k, lam, 1.) for k in range(8)]
            np.testing.assert_allclose(bounds.gegenbauer(s, d, 7), want, atol=1e-10)


def test_no_set_beats_the_bound():
    "Every code and every packing at hand lies below the bound for its size."
    r = np.random.default_rng(0)
    for n, d in ((5, 3), (20, 4), (100, 10), (300, 6)):
        x = geometry.unit(r.standard_normal((n, d)))
        assert np.degrees(geometry.nearest_neighbours(x)[0].min()) <= bounds.best_bound(n, d).angle_deg
    for dim in (2, 5, 18, 54, 64, 130, 512):
        for code in codes.catalogue(dim):
            assert code.cos >= bounds.best_bound(code.size, code.dim).cos - 1e-12, code


@pytest.mark.parametrize("n, dim", [(1, 3), (0, 3), (2.5, 3), (5, 0), (-1, 5)])
def test_bounds_refuse(n, dim):
    with pytest.raises(ConfigError):
        bounds.best_bound(n, dim)


def test_cap_probability_is_a_distribution():
    t = np.linspace(0, np.pi, 1001)
    for d in (2, 3, 4, 512):
        p = bounds.cap_probability(t, d)
        assert p[0] == 0 and p[-1] == pytest.approx(1) and (np.diff(p) >= 0).all() and p[500] == pytest.approx(.5)
    np.testing.assert_allclose(bounds.cap_probability(t, 3), (1 - np.cos(t)) / 2, atol=1e-12)
    np.testing.assert_allclose(bounds.cap_probability(t, 2), t / np.pi, atol=1e-12)


def test_two_random_points():
    r = bounds.random_reference(2, 512)
    assert r.min_median_deg == pytest.approx(90) and r.min_mean_deg == pytest.approx(90, abs=1e-6) and r.nn_median_deg == pytest.approx(90)


# ---- codes ------------------------------------------------------------------------------------------------------------------------
def test_dual_bch_of_512_dimensions_exhaustively():
    spectrum = codes.inner_products(codes.field_trace_basis(2, 9, (1, 3)), 2, chunk=16384)
    assert set(spectrum) == {-512., -32., 0., 32., 512.} and spectrum[512.] == 1 and sum(spectrum.values()) == 2 ** 19


def test_thirteen_thousand_points_every_pair():
    "The code that stands beside every packing of ten thousand: all 86 million pairs."
    code = codes.best_code(13_122, 512)
    x = codes.code_points(13_122, 512, seed=3)
    near, _ = geometry.nearest_neighbours(x)
    assert code.cos == pytest.approx(.04673, abs=1e-5)
    assert np.degrees(near.min()) == pytest.approx(code.angle_deg, abs=2e-4)


@pytest.mark.parametrize("dim", [6, 18, 54, 162])
def test_every_code_of_a_dimension_keeps_its_promise(dim):
    for code in codes.catalogue(dim):
        n = min(code.size, 4000)
        x = codes.code_points(n, dim, seed=1, code=code)
        near = geometry.nearest_neighbours(x)[0]
        assert np.cos(near.min()) <= code.cos + 2e-6, code


# ---- packing ----------------------------------------------------------------------------------------------------------------------
def test_ten_thousand_points_reach_the_target():
    r = packing.pack(10_000, seed=0)
    assert r.min_angle_deg >= 86.90 and r.converged and r.cpu_seconds < 60
    assert r.points.shape == (10_000, 512) and r.points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(r.points, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("n, d, optimum", [(6, 3, 90), (12, 3, 63.43495), (24, 3, 43.69077), (27, 6, 75.52249), (56, 7, 70.52878)])
def test_known_optima(n, d, optimum):
    found = packing.pack(n, d, seed=1).min_angle_deg
    assert optimum - 2e-3 < found < optimum + 1e-4


def test_simplex_and_cross_polytope_of_64_dimensions():
    for n in (65, 128):
        r = packing.pack(n, 64)
        assert r.bound_deg - r.min_angle_deg < .02 and r.converged


@pytest.mark.parametrize("method, extra", [("hyperface", {}), ("hyperface", dict(batch=64)), ("hinge", dict(symmetry="none")), ("hinge", dict(symmetry="cyclic")), ("code", {})])
def test_same_seed_same_points(method, extra):
    a, b = (packing.pack(300, 24, method=method, max_steps=25, seed=5, **extra) for _ in range(2))
    assert (a.points == b.points).all()
    c = packing.pack(300, 24, method=method, max_steps=25, seed=6, **extra)
    assert not np.array_equal(a.points, c.points)


def test_published_objective_never_moves_a_row_without_a_gradient():
    "One step without gallery moves two rows only."
    x = packing.start_points(50, 8, "random", None, 0)
    r = packing.pack(50, 8, method="hyperface", init=x, max_steps=1)
    moved = np.flatnonzero(np.abs(r.points - x).max(1) > 1e-6)
    assert set(moved) == set(packing.certify(x).closest)


def test_published_objective_follows_torch_adam():
    import torch
    x0 = geometry.unit(draws(40, 8)).astype(np.float32)
    g = geometry.unit(draws(30, 8, seed=1)).astype(np.float32)
    ours = packing.PublishedObjective(torch.from_numpy(x0), torch.from_numpy(g), alpha=.5, lr=1e-2)
    p = torch.nn.Parameter(torch.from_numpy(x0.copy()))
    adam = torch.optim.Adam([p], lr=1e-2)
    for _ in range(30):
        adam.zero_grad()
        cos = p @ p.T - 4 * torch.eye(40)
        i, j = divmod(int(cos.argmax()), 40)
        (-(1 - p[i] @ p[j]) + .5 * (1 - (p @ torch.from_numpy(g).T).max(1).values).mean()).backward()
        adam.step()
        with torch.no_grad():
            p /= p.norm(dim=1, keepdim=True)
        ours.step()
    np.testing.assert_allclose(ours.x.numpy(), p.detach().numpy(), atol=2e-4)


@pytest.mark.parametrize("c", [.5, .9, .99, 1.])
def test_anchors_are_kept_and_distinct(c):
    gallery = geometry.unit(draws(200, 24) + .5)
    r = packing.pack(80, 24, gallery=gallery, min_anchor_cosine=c, max_steps=60)
    cos = np.einsum("nd,nd->n", r.points, gallery[r.anchors])
    assert cos.min() >= c - 2e-6 and len(set(r.anchors)) == 80 and r.gallery_distance <= 1 - c + 1e-5


def test_anchors_within_a_subspace():
    gallery = geometry.unit(draws(300, 24) * np.r_[np.ones(12), np.full(12, .2)])
    r = packing.pack(60, 24, gallery=gallery, min_anchor_cosine=.8, subspace=12, max_steps=60)
    assert np.einsum("nd,nd->n", r.points, gallery[r.anchors]).min() >= .8 - 1e-5
    basis = packing.leading_subspace(gallery.astype(np.float32), 12)
    assert (1 - ((r.points @ basis.T) ** 2).sum(1)).max() < 1e-5 and r.bound_dim == 12


def test_given_start_takes_its_own_anchors():
    gallery = geometry.unit(draws(100, 16))
    r = packing.pack(40, 16, gallery=gallery, min_anchor_cosine=.9, init=gallery[10:50], max_steps=40)
    assert (r.anchors == np.arange(10, 50)).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(n=True), "n must be"), (dict(n=1.5), "n must be"), (dict(n=10, dim=0), "dim must be"), (dict(n=10, max_steps=-1), "max_steps"), (dict(n=10, max_seconds=0), "max_seconds"),
    (dict(n=10, alpha=-1), "alpha"), (dict(n=10, alpha=float("nan")), "alpha"), (dict(n=10, symmetry="mirror"), "symmetry"), (dict(n=10, init="x"), "init"),
    (dict(n=10, init="gallery"), "gallery"), (dict(n=100, symmetry="cyclic", init="random"), "cyclic"), (dict(n=20, symmetry="cyclic"), "at least"), (dict(n=10**6, method="code"), "No explicit code"),
    (dict(n=10, gallery=np.zeros((3, 16))), "Row 0 of gallery"), (dict(n=10, gallery=np.ones(16) * np.nan), "Row 0 of gallery"), (dict(n=10, subspace=4), "gallery"), (dict(n=4, batch=1, method="hyperface"), "batch")])
def test_pack_refuses(arguments, message):
    with pytest.raises((ConfigError, DataError), match=message):
        packing.pack(**{"dim": 16, **arguments})


@pytest.mark.parametrize("n, dim", [(1, 1), (1, 512), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (5, 1), (2, 512), (4, 4)])
@pytest.mark.parametrize("method", ["hinge", "hyperface", "code"])
def test_tiny_cases(n, dim, method):
    if method == "code" and dim == 1 and n > 2 or method == "code" and dim == 2 and n > 4:
        with pytest.raises(ConfigError):
            packing.pack(n, dim, method=method)
        return
    r = packing.pack(n, dim, method=method, max_steps=150)
    assert r.points.shape == (n, dim) and np.isfinite(r.points).all()
    if n == 1:
        assert math.isnan(r.min_angle_deg)
    elif method != "hyperface":
        assert r.min_angle_deg == pytest.approx(r.bound_deg, abs=.1)
    r._repr_html_()


def test_zero_steps_return_the_start():
    x = geometry.unit(draws(30, 8)).astype(np.float32)
    r = packing.pack(30, 8, init=x, max_steps=0)
    np.testing.assert_allclose(r.points, x, atol=1e-6)
    assert not r.converged and r.reason == "all steps made"


@pytest.mark.parametrize("start", [np.ones((50, 16)), np.ones((50, 16)) + 1e-6 * draws(50, 16), np.repeat(draws(5, 16), 10, axis=0)])
def test_copies_in_the_start_are_separated(start):
    r = packing.pack(50, 16, init=start, max_steps=100)
    assert r.min_angle_deg > 75 and r.duplicates == 0


def test_copies_in_the_gallery_are_separated_within_their_caps():
    gallery = geometry.unit(draws(5, 16)).repeat(4, axis=0)
    r = packing.pack(10, 16, gallery=gallery, min_anchor_cosine=.9, max_steps=60)
    assert r.min_angle_deg > 30 and r.anchor_cosine >= .9 - 1e-6


@pytest.mark.parametrize("seed", ["x", 1.5, True, None])
def test_seed_must_be_whole(seed):
    with pytest.raises(ConfigError, match="seed"):
        packing.pack(5, 4, seed=seed)


def test_target_angle_stops_early():
    r = packing.pack(1000, 64, symmetry="none", target_angle_deg=75)
    assert r.reason == "target angle reached" and r.min_angle_deg >= 75 - 1e-3 and r.steps < 150


@pytest.mark.parametrize("make", [dict(method="hyperface", batch=50), dict(symmetry="none"), dict(symmetry="cyclic"), dict(symmetry="small"),
                                  dict(gallery=geometry.unit(draws(400, 24) + .3), min_anchor_cosine=.8)])
def test_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, make):
    arguments = dict(n=200, dim=24, max_steps=40 if make.get("symmetry") != "small" else 6, seed=2, **make)
    whole = packing.pack(**arguments)
    kill_at = 3 if make.get("symmetry") == "small" else 17
    import hyperface.sphere.packing as module
    original = module._save_state

    def save_then_die(path, key, optimiser, spent):
        original(path, key, optimiser, spent)
        if optimiser.k == kill_at:
            raise KeyboardInterrupt
    monkeypatch.setattr(module, "_save_state", save_then_die)
    if make.get("symmetry") != "small":
        with pytest.raises(KeyboardInterrupt):
            packing.pack(**arguments, checkpoint=tmp_path / "s.npz", checkpoint_every=-1)
    monkeypatch.setattr(module, "_save_state", original)
    resumed = packing.pack(**arguments, checkpoint=tmp_path / "s.npz", checkpoint_every=-1)
    assert (resumed.points == whole.points).all() and resumed.steps == whole.steps and len(resumed.history) == len(whole.history)


def test_checkpoint_that_is_damaged_is_named(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"half a file")
    with pytest.raises(DataError, match="s.npz"):
        packing.pack(100, 16, symmetry="none", checkpoint=tmp_path / "s.npz")


def test_guard_is_forced():
    for scale in (5, 40, 1000):
        r = packing.pack(600, 32, symmetry="none", init="random", max_steps=150, step_scale=scale)
        assert r.history[-1]["guards"] > 0 and r.min_angle_deg > r.random_deg, scale
        o = orbits.OrbitHinge(600, 32, 200, scale=float(scale))
        while not o.done and o.k < 600:
            o.step()
        assert o.guards > 0 and o.max_cos < math.cos(math.radians(r.random_deg))


def test_extend_keeps_old_rows_and_separates_new_ones():
    old = packing.pack(400, 32, symmetry="none", max_steps=60)
    r = packing.extend(old.points, 100, max_steps=60)
    assert (r.points[:400] == old.points).all() and len(r.points) == 500
    assert r.min_angle_deg > bounds.random_reference(500, 32).min_median_deg + 10
    with pytest.raises(ConfigError):
        packing.extend(old.points, 0)


def test_low_precision_ends_near_full_precision():
    "On average: from one seed to another the angle of either varies by as much as .15 degrees."
    full, low = (np.mean([packing.pack(500, 64, symmetry="none", init="random", max_steps=120, low_precision=low, seed=seed).min_angle_deg for seed in range(8)]) for low in (False, True))
    assert abs(full - low) < .15


def test_save_and_load(tmp_path):
    gallery = geometry.unit(draws(60, 16))
    r = packing.pack(20, 16, gallery=gallery, min_anchor_cosine=.8, max_steps=20)
    back = packing.load_packing(r.save(tmp_path / "p.npz"))
    assert (back.points == r.points).all() and (back.anchors == r.anchors).all() and back.nn_quantiles_deg == r.nn_quantiles_deg and back.closest == r.closest
    assert back._repr_html_() == r._repr_html_()
    np.savez(tmp_path / "q.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="does not hold a packing"):
        packing.load_packing(tmp_path / "q.npz")


def test_orbit_points_are_what_the_fft_says():
    o = orbits.OrbitHinge(300, 30, 50, seed=1)
    for _ in range(40):
        o.step()
    x = o.points().numpy()
    assert x.shape == (300, 30)
    assert np.cos(geometry.nearest_neighbours(x)[0].min()) == pytest.approx(o.max_cos, abs=1e-6)


# ---- sampling ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("angle_deg", [0, 1e-4, 7.5, 90, 179.9, 180])
def test_draws_are_at_the_angle(angle_deg):
    x = geometry.unit(draws(7, 33))
    d = sampling.sample_at_angle(x, angle_deg, 5, seed=1)
    measured = np.degrees(geometry.angle(d.embeddings, x[d.identity]))
    np.testing.assert_allclose(measured, angle_deg, atol=6e-6 if angle_deg in (0, 180, 1e-4) else 2e-5)


@pytest.mark.parametrize("angle_deg, d", [(.01, 512), (1, 512), (7.5, 512), (60, 64), (.5, 3), (20, 2)])
def test_vmf_concentration_inverts_the_mean_cosine(angle_deg, d):
    from scipy.special import ive
    kappa = sampling.vmf_concentration(angle_deg, d)
    assert math.degrees(math.acos(sampling.vmf_mean_cosine(kappa, d))) == pytest.approx(angle_deg, rel=1e-6)
    if kappa < 1e5:
        assert sampling.vmf_mean_cosine(kappa, d) == pytest.approx(ive(d / 2, kappa) / ive(d / 2 - 1, kappa), rel=1e-9)


def test_directions_across_are_uniform():
    d = sampling.sample_at_angle(np.eye(1, 3), 90, 20_000, seed=0)
    phase = np.sort(np.arctan2(d.embeddings[:, 2], d.embeddings[:, 1]))
    uniform = np.linspace(-np.pi, np.pi, 20_000)
    assert np.abs(phase - uniform).max() < 2 * np.pi * 1.95 / np.sqrt(20_000)


def test_angles_per_identity_and_limits():
    x = geometry.unit(np.array([[1., 0, 0], [1, .05, 0], [0, 0, 1]]))
    d = sampling.sample_at_angle(x, [5, 10, 20], 4, keep_apart=True)
    limit = np.degrees(sampling.neighbour_limit(x))
    np.testing.assert_allclose(d.angle_deg.reshape(3, 4), np.minimum([5, 10, 20], limit)[:, None] * np.ones((1, 4)))
    assert ((d.embeddings @ x.T.astype(np.float32)).argmax(1) == d.identity).reshape(3, 4)[2].all()


@pytest.mark.parametrize("call", [lambda x: sampling.sample_gaussian(x, -1, 2), lambda x: sampling.sample_gaussian(x, .3, 2, length=0), lambda x: sampling.sample_gaussian(x, [.1, .2, .3], 2),
                                  lambda x: sampling.sample_interval(x, 2, 2), lambda x: sampling.sample_vmf(x, 0, 2), lambda x: sampling.sample_vmf(x, float("inf"), 2),
                                  lambda x: sampling.neighbour_limit(x, 0), lambda x: sampling.sample_at_angle(x, float("nan"), 2), lambda x: sampling.sample_at_angle(x, 5, 2.5)])
def test_sampling_refuses(call):
    with pytest.raises(ConfigError):
        call(geometry.unit(draws(4, 5)))


# ---- many processes, kills, groups, faces -------------------------------------------------------------------------------------------
PACK_ONCE = """
import json, os, sys
import numpy as np, torch
torch.set_num_threads(1)
from hyperface.core import rng
from hyperface.sphere.geometry import unit
from hyperface.sphere.packing import extend, pack
gallery = unit(rng(0, "gallery").standard_normal((500, 32)) + .4)
free = pack(1500, 64, symmetry="none", init="random", max_steps=120, seed=0, low_precision=False, checkpoint=sys.argv[1] + ".state.npz", checkpoint_every=0)
orbit = pack(1500, 64, max_steps=200, seed=0)
tied = pack(300, 32, gallery=gallery, min_anchor_cosine=.9, max_steps=40, seed=0, low_precision=False)
grown = extend(gallery[:300], 61, max_steps=30)
rank = os.environ.get("RANK", "0")
found = {k: [r.min_angle_deg, float(np.float64(r.points).sum()), r.gallery_distance if k == "tied" else 0.] for k, r in dict(free=free, orbit=orbit, tied=tied, grown=grown).items()}
assert np.allclose(grown.points[:300], gallery[:300], atol=1e-6) and tied.anchor_cosine >= .9 - 1e-5
json.dump(found, open(sys.argv[1] + rank, "w"))
"""


def spawn(code, *arguments, ranks=1, timeout=240, **environment):
    import os
    env = {**os.environ, "HYPERFACE_PROGRESS": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in (str(Path(packing.__file__).parents[2]), os.environ.get("PYTHONPATH")) if p), **environment}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run([sys.executable, *start, str(code), *map(str, arguments)], capture_output=True, text=True, env=env, timeout=timeout)


def test_two_gloo_processes_find_the_angle_of_one(tmp_path):
    import json
    code = tmp_path / "once.py"
    code.write_text(PACK_ONCE)
    for name, ranks in (("one", 1), ("two", 2)):
        done = spawn(code, tmp_path / name, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (json.loads((tmp_path / f).read_text()) for f in ("one0", "two0", "two1"))
    assert first == second, "the ranks return different points"
    for kind in ("free", "orbit", "tied", "grown"):
        assert abs(one[kind][0] - first[kind][0]) <= .01, (kind, one[kind], first[kind])
    with np.load(tmp_path / "two.state.npz") as state:
        assert state["x"].shape == (1500, 64)


def test_ranks_with_different_arguments_are_refused(tmp_path):
    code = tmp_path / "differ.py"
    code.write_text("import os\nfrom hyperface.sphere.packing import pack\npack(200, 24, symmetry='none', max_steps=5, seed=int(os.environ['RANK']))")
    done = spawn(code, ranks=2)
    assert done.returncode != 0 and "different arguments" in done.stderr


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import hyperface.sphere.packing as p
step, die = p.Hinge.step, int(sys.argv[3])
def dying(self, *a):
    if self.k == die: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *a)
p.Hinge.step = dying
p.pack(400, 32, symmetry="none", init="random", max_steps=60, seed=4, checkpoint=sys.argv[1] or None, checkpoint_every=0).save(sys.argv[2])
"""


def test_sigkill_and_resume_give_the_same_bits(tmp_path):
    code, state = tmp_path / "killed.py", tmp_path / "state.npz"
    code.write_text(KILLED)
    assert spawn(code, "", tmp_path / "whole.npz", -1).returncode == 0
    for die in (20, 41):
        assert spawn(code, state, tmp_path / "no.npz", die).returncode == -9
    assert state.exists() and not (tmp_path / "no.npz").exists() and not [f for f in tmp_path.iterdir() if "part" in f.name or "tmp" in f.suffix and f != state]
    assert spawn(code, state, tmp_path / "resumed.npz", -1).returncode == 0
    whole, resumed = (packing.load_packing(tmp_path / f"{n}.npz") for n in ("whole", "resumed"))
    assert (whole.points == resumed.points).all() and whole.steps == resumed.steps
    assert [h["max_cos"] for h in whole.history] == [h["max_cos"] for h in resumed.history]


def test_signature_is_the_promised_one():
    import inspect
    wanted = dict(n=inspect.Parameter.empty, dim=512, method="hinge", gallery=None, min_anchor_cosine=None, alpha=.5, init=None, max_steps=None, max_seconds=None, target_angle_deg=None, seed=0, device=None)
    found = inspect.signature(packing.pack).parameters
    assert list(found)[:len(wanted)] == list(wanted) and {k: found[k].default for k in wanted} == wanted
    assert all(p.kind is p.KEYWORD_ONLY for k, p in found.items() if k not in ("n", "dim"))


@pytest.mark.parametrize("extra", [{}, dict(min_anchor_cosine=.9), dict(method="hyperface"), dict(method="code"), dict(subspace=3), dict(init="gallery")])
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_points_with_a_gallery(n, extra):
    gallery = geometry.unit(draws(9, 6) + .5)
    r = packing.pack(n, 6, gallery=gallery, max_steps=30, **extra)
    assert r.points.shape == (n, 6) and np.isfinite(r.points).all() and 0 <= r.gallery_distance <= 2
    assert math.isnan(r.min_angle_deg) == (n == 1)
    if "min_anchor_cosine" in extra:
        assert r.anchor_cosine >= .9 - 1e-5
    r._repr_html_()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_line_with_a_gallery(n):
    r = packing.pack(n, 1, gallery=np.array([[1.], [-2.], [3.]]))
    assert set(np.abs(r.points.ravel())) == {1.} and (n != 2 or r.min_angle_deg == pytest.approx(180))


def test_nan_gallery_row_is_named():
    gallery = draws(20, 16)
    gallery[7, 3] = np.nan
    with pytest.raises(DataError, match="Row 7 of gallery is not finite"):
        packing.pack(5, 16, gallery=gallery)
    gallery[7] = 0
    with pytest.raises(DataError, match="Row 7 of gallery is all zeros"):
        packing.pack(5, 16, gallery=gallery)


def test_clustered_start_comes_apart_without_the_guard():
    r = np.random.default_rng(0)
    start = geometry.unit((r.standard_normal((1300, 64)) * np.exp(-np.arange(64) / 20) + .3 * np.eye(64)[0]).astype(np.float32))
    found = packing.pack(1300, 64, init=start, max_steps=60)
    assert found.history[-1]["guards"] == 0 and found.min_angle_deg > 78 and found.bound_deg > found.min_angle_deg
    kept = (found.points * start).sum(1).mean()
    assert kept > .4, "points left their start behind"


@pytest.mark.slow
def test_eight_dimensional_roots_and_the_24_cell():
    assert packing.pack(24, 4).min_angle_deg == pytest.approx(60, abs=1e-3)
    assert packing.pack(240, 8).min_angle_deg == pytest.approx(60, abs=1e-3)


def test_picture_of_a_result():
    import matplotlib
    matplotlib.use("Agg")
    r = packing.pack(60, 8, max_steps=32)
    a, b = r.plot()
    assert len(a.lines) >= 2 and b.patches and "<svg" in r._repr_html_() and "bound" in r._repr_html_()
    assert r.nn_deg.shape == (60,) and r.nn_deg.min() == pytest.approx(r.min_angle_deg, abs=1e-4)


def test_groups_even_out_what_a_cut_does_not():
    from hyperface.sphere.groups import assign_groups, group_separation
    r = np.random.default_rng(1)
    points = geometry.unit(r.standard_normal((400, 16)) * np.r_[np.ones(8), np.full(8, .3)] + np.r_[.8, np.zeros(15)] * (np.arange(400) < 150)[:, None])
    cut = group_separation(points, np.arange(400) // 134)
    even = assign_groups(points, {0: 134, 1: 134, 2: 132}, seed=1, max_tries=4000)
    assert even.tail_gap_deg < .5 * cut.tail_gap_deg and max(abs(g["share"] - 1) for g in even.rows) < .05 < max(abs(g["share"] - 1) for g in cut.rows)
    assert np.bincount(even.labels.astype(int)).tolist() == [134, 134, 132]
    assert (assign_groups(points, {0: 134, 1: 134, 2: 132}, seed=1, max_tries=4000).labels == even.labels).all()
    cosines = np.degrees(np.arccos(np.clip(points @ points.T, -1, 1)))
    for g in even.rows:
        mine = even.labels == g["group"]
        inside = cosines[np.ix_(mine, mine)][np.triu_indices(mine.sum(), 1)]
        assert inside.min() == pytest.approx(g["min_within_deg"], abs=1e-3) and cosines[np.ix_(mine, ~mine)].min() == pytest.approx(g["min_between_deg"], abs=1e-3)
        assert np.mean(inside <= g["tail_within_deg"] + 1e-4) == pytest.approx(1 / even.one_in, rel=.1)


def test_groups_of_hardly_any_points():
    from hyperface.sphere.groups import assign_groups, group_separation
    assert assign_groups(np.eye(3), ["a", "b", "c"]).labels.tolist() != [] and assign_groups(np.eye(2), ["a"]).rows[0]["min_within_deg"] == pytest.approx(90)
    for bad in (dict(sizes={"a": -1}), dict(sizes=["a", "b", "c", "d"])):
        with pytest.raises(ConfigError):
            assign_groups(np.eye(3), **bad)
    with pytest.raises(DataError):
        group_separation(np.eye(1), ["a"])


def test_front_and_yardstick():
    from hyperface.sphere.faces import equal_steps, front, yardstick
    r = np.random.default_rng(2)
    centres = geometry.unit(r.standard_normal((120, 24)) + .7 * np.eye(24)[0])
    photos = geometry.unit(np.repeat(centres, 3, axis=0) + .1 * r.standard_normal((360, 24)))
    rod = yardstick(photos, np.repeat(np.arange(120), 3), held_out=.25, seed=1)
    assert len(rod.gallery) == 90 and len(rod.held_out) == 30 and rod.stranger < rod.self_
    i = 5
    others = geometry.unit(photos[[16, 17]].sum(0))
    assert rod.same[15] == pytest.approx(float(photos[15] @ others), abs=1e-5) and i == 15 // 3
    curve = front(rod, 50, cosines=(.8, 1., .9), alphas=(.1, 10.), max_steps=30)
    assert curve.cosines == (1., .9, .8) and curve.dominates and [x.steps for x in curve.published] == [equal_steps(30, 50, 90)] * 2
    assert curve.ours[0].gallery_distance == pytest.approx(0, abs=1e-5) and all(x.anchor_cosine >= c - 1e-5 for c, x in zip(curve.cosines, curve.ours))
    with pytest.raises(ConfigError, match="the gallery has 90"):
        front(rod, 91)

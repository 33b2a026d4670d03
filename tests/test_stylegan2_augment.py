"""The augmentation pipe against definitions restated in numpy and scipy, and its controller."""
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, special, stats

from hyperface.core import ConfigError, DataError
from hyperface.stylegan2 import augment as A

rng = lambda seed=0: torch.Generator().manual_seed(seed)


def smooth(n=2, h=32, w=32, c=3, seed=0, sigma=2.5):
    "Random images without fine detail, in [-1, 1], float64."
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(n, c, h, w)), (0, 0, sigma, sigma), mode="mirror")
    return torch.from_numpy(x/np.abs(x).max())


def rough(n=2, h=32, w=32, c=3, seed=0, dtype=torch.float32):
    return torch.rand(n, c, h, w, generator=rng(seed), dtype=dtype)*2 - 1


T = lambda x, y: np.array([[1, 0, x], [0, 1, y], [0, 0, 1.]])
S = lambda x, y: np.diag([x, y, 1.])
R = lambda a: np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
batch = lambda M: torch.tensor(np.asarray(M), dtype=torch.float32).reshape(-1, *np.shape(M)[-2:])


# ---------------------------------------------------------------- matrices

def test_plane_matrices_are_the_textbook_ones():
    a, x, y = (torch.randn(7, generator=rng(i)) for i in range(3))
    for k in range(7):
        np.testing.assert_allclose(A.translate2d(x, y)[k], T(x[k], y[k]), atol=1e-6)
        np.testing.assert_allclose(A.scale2d(x, y)[k], S(x[k], y[k]), atol=1e-6)
        np.testing.assert_allclose(A.rotate2d(a)[k], R(a[k].item()), atol=1e-6)
    G = A.translate2d(x, 3.) @ A.rotate2d(a) @ A.scale2d(1.5, y.abs() + .5)
    np.testing.assert_allclose(A.invert2d(G), np.linalg.inv(G.double()), atol=1e-4)


def test_colour_matrices_against_scipy():
    from scipy.spatial.transform import Rotation
    a, v = torch.tensor([.3, -2.]), np.array([1., -2, .5]); u = v/np.linalg.norm(v)
    M = A.rotate3d(tuple(v), a)
    for k in range(2):
        np.testing.assert_allclose(M[k, :3, :3], Rotation.from_rotvec(u*a[k].item()).as_matrix(), atol=1e-6)
    np.testing.assert_allclose(A.reflect3d(tuple(v), torch.ones(1))[0, :3, :3], np.eye(3) - 2*np.outer(u, u), atol=1e-6)
    np.testing.assert_allclose(A.reflect3d(tuple(v), torch.zeros(1))[0], np.eye(4), atol=1e-6)
    np.testing.assert_allclose(A.stretch3d(tuple(v), torch.tensor([2.5]))[0, :3, :3], np.outer(u, u) + 2.5*(np.eye(3) - np.outer(u, u)), atol=1e-6)
    np.testing.assert_allclose(A.translate3d(a, 0, 1)[1], [[1, 0, 0, -2], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], atol=1e-6)
    for C in (M, A.scale3d(a, a, a), A.stretch3d((1, 1, 1), a)):
        np.testing.assert_allclose(C[:, 3], [[0, 0, 0, 1]]*2)


ALL_GEOMETRY = dict(xflip=1, rotate90=1, xint=1, scale=1, rotate=1, aniso=1, xfrac=1)


@pytest.mark.parametrize("q", [.1, .3, .5, .77, .95])
def test_percentile_geometry(q):
    w, h = 48, 40
    z = special.erfinv(2*q - 1)
    s = 2**(.2*z)
    want = T(z*.125*w, z*.125*h) @ S(s, 1/s) @ R(-(2*q - 1)*np.pi) @ S(s, s) @ T(round((2*q - 1)*.125*w), round((2*q - 1)*.125*h)) @ R(-np.pi/2*math.floor(4*q)) @ S(1 - 2*math.floor(2*q), 1)
    got = A.sample_geometry(A.Draws(3, percentile=q), w, h, **ALL_GEOMETRY)
    np.testing.assert_allclose(got, np.broadcast_to(want, (3, 3, 3)), atol=2e-5)
    alone = A.sample_geometry(A.Draws(1, percentile=q), w, h, scale=.01)[0]               # any strength above 0 applies
    np.testing.assert_allclose(alone, S(s, s), atol=1e-6)


@pytest.mark.parametrize("q", [.1, .5, .77])
def test_percentile_colour(q):
    z = special.erfinv(2*q - 1)
    v = np.array([1, 1, 1, 0])/np.sqrt(3); vv = np.outer(v, v); a = (2*q - 1)*np.pi
    K = np.zeros((4, 4)); K[:3, :3] = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])/np.sqrt(3)
    brightness = np.eye(4); brightness[:3, 3] = .2*z
    c, s = 2**(.5*z), 2**z
    hue = np.eye(4) + np.sin(a)*K + (1 - np.cos(a))*K @ K
    saturation = vv + (np.eye(4) - vv)*s; saturation[3, 3] = 1
    want = saturation @ hue @ (np.eye(4) - 2*vv*math.floor(2*q)) @ np.diag([c, c, c, 1]) @ brightness
    got = A.sample_colour(A.Draws(2, percentile=q), 1, 1, 1, 1, 1)
    np.testing.assert_allclose(got, np.broadcast_to(want, (2, 4, 4)), atol=1e-5)
    x = rough()
    flat = np.einsum("ij,njhw->nihw", want[:3, :3], x.numpy()) + want[:3, 3, None, None]
    np.testing.assert_allclose(A.recolour(x, got), flat, atol=1e-5)
    np.testing.assert_allclose(A.augment_pipe("color")(x, debug_percentile=q), flat, atol=1e-5)


def test_grey_images_are_the_mean_of_their_coloured_selves():
    x = rough(c=1)
    C = A.sample_colour(A.Draws(2, generator=rng(3)), 1, 1, 1, 1, 1)
    np.testing.assert_allclose(A.recolour(x, C), A.recolour(x.expand(-1, 3, -1, -1), C).mean(1, keepdim=True), atol=1e-5)


# ---------------------------------------------------------------- wavelets and warping

@pytest.mark.parametrize("taps,moments", [(A.SYM6, 6), (A.SYM2, 2)])
def test_wavelets_by_their_properties(taps, moments):
    h = np.array(taps); n = len(h)
    assert abs(h.sum() - np.sqrt(2)) < 1e-10 and n == 2*moments
    for k in range(n//2):
        assert abs(h[2*k:] @ h[:n - 2*k] - (k == 0)) < 1e-11
    high = (-1.)**np.arange(n)*h
    for m in range(moments):
        assert abs(high @ np.arange(n)**m) < 1e-8
    assert abs(high @ np.arange(n)**moments) > .1                                        # and not one more


def naive_warp(image, G, pad):
    "One channel, one image: mirror, insert zeros, convolve, read, convolve, drop: all by definition."
    h, w = image.shape; k = 12; taps = np.array(A.SYM6)/np.sum(A.SYM6)
    x = np.pad(image, pad, mode="reflect")
    up = np.zeros((2*x.shape[0], 2*x.shape[1])); up[::2, ::2] = x
    for axis in (0, 1):                                                                  # position u gets sum_n x[n] 2 taps[u + 5 - 2n]
        up = np.apply_along_axis(lambda r: 2*np.convolve(r, taps)[5:5 + len(r)], axis, up)
    around = 16
    oy, ox = np.mgrid[-around:2*h + around, -around:2*w + around].astype(float)           # doubled pixels of the result; pixel n sits at 2n
    rel = np.stack([ox/2 - (w - 1)/2, oy/2 - (h - 1)/2, np.ones_like(ox)]).reshape(3, -1)
    x, y, _ = np.linalg.inv(G) @ rel
    at = np.stack([2*(y + (h - 1)/2 + pad), 2*(x + (w - 1)/2 + pad)])
    v = ndimage.map_coordinates(up, at, order=1, mode="grid-constant", cval=0).reshape(oy.shape)
    for axis in (0, 1):                                                                  # result n is sum_t taps[t] v[2n - 5 + t]: the adjoint
        v = np.apply_along_axis(lambda r: np.correlate(r, taps, "full")[k - 1:][:len(r)], axis, v)
    start = around - 5
    return v[start:start + 2*h:2, start:start + 2*w:2]


@pytest.mark.parametrize("h,w", [(24, 24), (20, 28)])
def test_warp_by_definition(h, w):
    x = rough(5, h, w, dtype=torch.float64)
    G = np.stack([np.eye(3), T(2.3, -1.1), R(.5) @ S(1.2, .9), T(-4, 3) @ R(-2.2) @ S(-1.1, 1.05), T(.5, .5)])
    got = A.warp(x, torch.from_numpy(G))
    assert got.shape == x.shape
    for k in range(5):
        np.testing.assert_allclose(got[k, 0], naive_warp(x[k, 0].numpy(), G[k], min(h, w) - 1), atol=2e-6)


def test_warp_does_not_depend_on_its_neighbours():
    x = rough(9, 20, 20)
    G = A.sample_geometry(A.Draws(9, generator=rng(5)), 20, 20, **ALL_GEOMETRY)
    alone = torch.cat([A.warp(x[k:k + 1], G[k:k + 1]) for k in range(9)])
    for together in (None, 2, 4, 9):
        torch.testing.assert_close(A.warp(x, G, together=together), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("h,w,margins", [(16, 16, (0, 0, 0, 0)), (9, 14, (13, 3, 0, 8)), (2, 3, (1, 1, 2, 1))])
def test_both_ways_of_doubling_are_one(h, w, margins):
    x, taps = rough(2, h, w), A.setup_filter(A.SYM6)
    left, top, right, bottom = margins
    want = A.upsample2d(torch.nn.functional.pad(x, (left, right, top, bottom), mode="reflect"), taps)
    torch.testing.assert_close(A._double(x, margins, taps), want, atol=2e-6, rtol=0)


def test_nothing_moved_is_nothing_changed():
    x = rough(3, 17, 23)
    torch.testing.assert_close(A.warp(x, torch.eye(3).repeat(3, 1, 1)), x, atol=3e-6, rtol=0)
    shift = batch(T(3, -2))
    torch.testing.assert_close(A.warp(x[:1], shift)[..., :15, 3:], x[:1, :, 2:, :-3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("G", [R(.4), R(-1.9), S(1.25, 1.25), S(.85, .85), S(1.2, 1/1.2), T(2.5, -1.25), T(1.2, .3) @ R(.7) @ S(1.1, 1/1.1)])
def test_smooth_images_against_scipy(G):
    x = smooth(1, 40, 40)
    got = A.warp(x, torch.from_numpy(G)[None])[0].numpy()
    P = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]]); centre = T(19.5, 19.5)
    inverse = P @ centre @ np.linalg.inv(G) @ np.linalg.inv(centre) @ P                   # rows before columns, as scipy wants it
    for c in range(3):
        want = ndimage.affine_transform(x[0, c].numpy(), inverse[:2, :2], inverse[:2, 2], order=5, mode="mirror")
        assert np.abs(got[c] - want).max() < .04 and np.abs(got[c] - want).mean() < .012      # the wavelet sits a tenth of a small pixel off


def test_far_away_is_zero():
    x = torch.ones(1, 3, 16, 16)
    y = A.warp(x, batch(S(.2, .2)))
    assert y[0, 0, 0, 0].abs() < 1e-4 and (y[0, 0, 8, 8] - 1).abs() < 1e-5


# ---------------------------------------------------------------- blits

def test_copies_are_exact():
    x = rough(4, 12, 12)
    assert torch.equal(A.blit(x, batch(S(-1, 1)).repeat(4, 1, 1)), x.flip(3))
    quarter = A.sample_geometry(A.Draws(400, generator=rng()), 12, 12, rotate90=1)
    turned = A.blit(x[:1].expand(400, -1, -1, -1), quarter)
    which = [next(k for k in range(4) if torch.equal(t, torch.rot90(x[0], k, (1, 2)))) for t in turned]
    assert min(np.bincount(which, minlength=4)) > 70
    xint = A.sample_geometry(A.Draws(50, generator=rng()), 12, 12, xint=1, xint_max=.5)
    for G, y in zip(xint, A.blit(x[:1].expand(50, -1, -1, -1), xint)):
        dx, dy = G[:2, 2].int().tolist()
        assert abs(dx) <= 6 and abs(dy) <= 6
        padded = np.pad(x[0].numpy(), ((0, 0), (6, 6), (6, 6)), mode="reflect")
        np.testing.assert_array_equal(y, padded[:, 6 - dy:18 - dy, 6 - dx:18 - dx])


def test_exact_blits_in_the_pipe():
    x = rough(64, 16, 16)
    exact, wavelet = (A.augment_pipe("bg", exact_blits=e) for e in (True, False))
    assert torch.equal(A.AugmentPipe(xflip=1, exact_blits=True)(x, debug_percentile=.6), x.flip(3))
    for pipe in (exact, wavelet):
        pipe.p.fill_(.3)
    a, b = exact(x, generator=rng()), wavelet(x, generator=rng())
    draws = A.Draws(64, .3, rng())
    G = A.sample_geometry(draws, 16, 16, **wavelet.settings("geometry"))
    moved = (G != torch.eye(3)).flatten(1).any(1)
    assert torch.equal(a[~moved], x[~moved]) and torch.equal(b[~moved], x[~moved]) and 0 < (~moved).sum() < 64
    between, copied = moved & ~A.is_blit(G), moved & A.is_blit(G)
    torch.testing.assert_close(a[between], b[between], atol=1e-4, rtol=0)
    assert copied.any() and torch.equal(a[copied], A.blit(x[copied], G[copied]))
    s = smooth(2, 32, 32).float()
    torch.testing.assert_close(A.AugmentPipe(xflip=1)(s, debug_percentile=.6), s.flip(3), atol=.04, rtol=0)
    with pytest.raises(ConfigError, match="whole pixels"):
        A.blit(x[:1], batch(R(.3)))


# ---------------------------------------------------------------- filters, noise, hole

def test_bank_is_the_product_of_polynomials():
    h = np.array(A.SYM2)
    low = np.convolve(h, h[::-1])/2
    high = low*(-1.)**np.arange(-3, 4)
    def spread(f, k):
        out = np.zeros((len(f) - 1)*k + 1); out[::k] = f
        return out
    want = [np.convolve(np.convolve(low, spread(low, 2)), spread(low, 4)), np.convolve(np.convolve(low, spread(low, 2)), spread(high, 4)), np.convolve(low, spread(high, 2)), high]
    bank = A.band_filters().numpy()
    for got, f in zip(bank, want):
        np.testing.assert_allclose(got, np.pad(f, (43 - len(f))//2), atol=1e-7)
    np.testing.assert_allclose(bank.sum(0), np.eye(43)[21], atol=1e-6)
    response = np.abs(np.fft.rfft(bank, 512))
    peaks = response.argmax(1)/256                                                        # shares of pi
    assert peaks[0] == 0 and 1/8 < peaks[1] < 1/4 < peaks[2] < 1/2 < peaks[3]


@pytest.mark.parametrize("h,w", [(48, 48), (30, 52), (5, 9)])
def test_amplify_is_a_mirrored_convolution(h, w):
    x, gains, bank = rough(3, h, w), torch.rand(3, 4, generator=rng(1))*3, A.band_filters()
    got = A.amplify(x, gains, bank)
    for k in range(3):
        f = gains[k].numpy() @ bank.numpy()
        want = ndimage.convolve1d(ndimage.convolve1d(x[k].numpy(), f, axis=1, mode="mirror"), f, axis=2, mode="mirror")
        np.testing.assert_allclose(got[k], want, atol=2e-4)


def test_gains_keep_the_expected_power():
    lam = np.array([10, 1, 1, 1])/13
    for k in range(4):
        g = A.sample_gains(A.Draws(50, generator=rng(k)), 1, [float(j == k) for j in range(4)]).numpy().astype(float)
        np.testing.assert_allclose(g**2 @ lam, 1, atol=1e-5)
        ratio = np.log2(g[:, k]/g[:, (k + 1) % 4])                                        # the drawn gain: 2^N(0, 1)
        assert abs(ratio.mean()) < .5 and .7 < ratio.std() < 1.3
    q, z = .8, special.erfinv(.6)
    want = np.ones(4)
    for k in range(4):
        t = np.ones(4); t[k] = 2**z
        want = want*t/np.sqrt(lam @ t**2)
    np.testing.assert_allclose(A.sample_gains(A.Draws(1, percentile=q), .5)[0], want, atol=1e-6)
    half = A.sample_gains(A.Draws(4000, .5, rng()), .5, (1, 1, 0, 0))
    assert abs((half != 1).any(1).float().mean() - (1 - .75**2)) < .03


def test_noise():
    x = torch.zeros(2000, 3, 8, 8)
    y = A.AugmentPipe(noise=1)(x, generator=rng())
    sigma = y.std((1, 2, 3)).numpy()
    assert abs((y**2).mean().sqrt() - .1) < .005                                         # E sigma^2 = .1^2
    assert stats.kstest(sigma, stats.halfnorm(scale=.1).cdf).pvalue > 1e-3
    flat = A.AugmentPipe(noise=1)(x, debug_percentile=.5, generator=rng())
    assert abs(flat.std() - .1*special.erfinv(.5)) < 1e-3


def test_hole():
    x = rough(300, 20, 28) + 3
    holes = A.sample_hole(A.Draws(300, .5, rng()), 1, .4)
    y = A.cut(x, holes)
    assert abs((holes[:, 2] > 0).float().mean() - .5) < .1
    for k in range(300):
        cx, cy, side = holes[k].double().tolist()
        col, row = (np.arange(28) + .5)/28, (np.arange(20) + .5)/20
        gone = (np.abs(row - cy) < side/2)[:, None] & (np.abs(col - cx) < side/2)[None]
        np.testing.assert_array_equal(y[k], np.where(gone, 0, x[k]))
    z = A.AugmentPipe(cutout=1)(torch.ones(1, 1, 16, 16), debug_percentile=.5)[0, 0]
    assert (z[4:12, 4:12] == 0).all() and z.sum() == 256 - 64


# ---------------------------------------------------------------- the pipe

@pytest.mark.parametrize("name", A.AUGPIPES)
def test_p_0_is_the_identity(name):
    x, pipe = rough(), A.augment_pipe(name)
    assert pipe.p == 1
    pipe.p.fill_(0)
    assert torch.equal(pipe(x), x)
    pipe.p.fill_(1e-12)
    assert torch.equal(pipe(x, generator=rng()), x)
    assert torch.equal(A.AugmentPipe()(x), x)                                            # no strength, any p


def test_named_pipes():
    blit, geom, color = {"xflip", "rotate90", "xint"}, {"scale", "rotate", "aniso", "xfrac"}, {"brightness", "contrast", "lumaflip", "hue", "saturation"}
    want = dict(blit=blit, geom=geom, color=color, filter={"imgfilter"}, noise={"noise"}, cutout={"cutout"}, bg=blit | geom, bgc=blit | geom | color)
    want |= dict(bgcf=want["bgc"] | {"imgfilter"}, bgcfn=want["bgc"] | {"imgfilter", "noise"}, bgcfnc=want["bgc"] | {"imgfilter", "noise", "cutout"})
    assert {k: set(v) for k, v in A.AUGPIPES.items()} == want and all(set(v.values()) == {1} for v in A.AUGPIPES.values())
    pipe = A.augment_pipe("bgc", hue=.5)
    assert (pipe.hue, pipe.scale, pipe.imgfilter, pipe.xint_max, pipe.contrast_std, pipe.saturation_std) == (.5, 1, 0, .125, .5, 1)
    assert {k: tuple(v.shape) for k, v in pipe.state_dict().items()} == dict(p=(), Hz_geom=(12,), Hz_fbank=(4, 43))
    np.testing.assert_allclose(pipe.Hz_geom, np.array(A.SYM6)/np.sum(A.SYM6), atol=1e-7)


def test_median_draw_of_the_default_pipe():
    "At the median only flip, half turn and luma flip are left."
    x = rough(2, 16, 16)
    y = A.augment_pipe("bgc", exact_blits=True)(x, debug_percentile=.5)
    want = x.flip(3).rot90(2, (2, 3))
    want = want - 2*want.mean(1, keepdim=True)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=0)


def test_how_often():
    n, p = 20_000, .4
    d = A.Draws(n, p, rng())
    for name in A.COINS:
        assert abs(d.on(name, .5).float().mean() - .2) < .012
    turned = (A.sample_geometry(d, 64, 64, rotate=1) != torch.eye(3)).flatten(1).any(1).float().mean()
    assert abs(turned - p) < .012
    flips = A.sample_geometry(d, 64, 64, xflip=1)[:, 0, 0]
    assert abs((flips < 0).float().mean() - p/2) < .012
    quarters = A.sample_geometry(d, 64, 64, rotate90=1)[:, :2, :2].reshape(n, 4)
    T_p = [(quarters == torch.tensor(k).float()).all(1).float().mean().item() for k in ([1, 0, 0, 1], [0, 1, -1, 0], [-1, 0, 0, -1], [0, -1, 1, 0])]
    np.testing.assert_allclose(T_p, [1 - .75*p, p/4, p/4, p/4], atol=.012)
    s = A.sample_geometry(d, 64, 64, scale=1)[:, 0, 0]
    on = s != 1
    assert abs(s[on].log2().std() - .2) < .005 and abs(on.float().mean() - p) < .012
    t = A.sample_geometry(d, 64, 32, xfrac=1)[:, :2, 2]
    assert (t[t[:, 0] != 0].std(0) - torch.tensor([8., 4.])).abs().max() < .3
    assert A.Draws(n, 3., rng()).on("xflip", .2).float().mean() == pytest.approx(.6, abs=.012)   # p above 1
    assert A.Draws(n, 3., rng()).on("xflip", 1).all() and A.Draws(n, 3., rng()).on("before", 1, twice=True).all()


def test_generator_decides_everything():
    x, pipe = rough(6), A.augment_pipe("bgcfnc")
    pipe.p.fill_(.5)
    torch.manual_seed(1); before = torch.get_rng_state()
    a, b, c = pipe(x, generator=rng(7)), pipe(x, generator=rng(7)), pipe(x, generator=rng(8))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3); d = pipe(x)
    torch.manual_seed(3); assert torch.equal(pipe(x), d)
    few, many = A.AugmentPipe(hue=1), A.AugmentPipe(hue=1, saturation=1e-9)                # a number belongs to its transformation, not to a queue
    torch.testing.assert_close(few(x, generator=rng(7)), many(x, generator=rng(7)))
    assert torch.equal(A.Draws(6, .1, rng(7)).normal("scale"), A.Draws(6, .9, rng(7)).normal("scale"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    x, pipe = rough(3, dtype=torch.float32), A.augment_pipe("bgcfnc")
    want, got = pipe(x, generator=rng()), pipe(x.to(dtype), generator=rng())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol={torch.float64: 1e-3, torch.float16: 1e-2, torch.bfloat16: .1}[dtype], rtol=.02)


def test_autocast_leaves_it_alone():
    x, pipe = rough(3), A.augment_pipe("bgcf")
    want = pipe(x, generator=rng())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipe(x, generator=rng()), want)


def test_empty_batch_and_odd_sizes():
    pipe = A.augment_pipe("bgcfnc")
    assert pipe(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)
    for shape in ((1, 3, 2, 2), (3, 1, 9, 14), (2, 3, 31, 8)):
        y = pipe(torch.rand(shape), generator=rng())
        assert y.shape == shape and y.isfinite().all()


# ---------------------------------------------------------------- derivatives

@pytest.mark.parametrize("p", [1., .5])
def test_first_and_second_derivatives_through_the_whole_pipe(p):
    pipe = A.augment_pipe("bgcfnc", exact_blits=p < 1)
    pipe.p.fill_(p)
    x = rough(3 if p < 1 else 1, 5, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pipe(x, generator=rng(4)), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pipe(x, generator=rng(4))**2, x, fast_mode=True)


def test_reading_and_spreading_are_adjoint():
    G = A.sample_geometry(A.Draws(3, generator=rng(2)), 8, 8, **ALL_GEOMETRY)
    grid = torch.nn.functional.affine_grid(A.invert2d(G)[:, :2].double(), [3, 2, 6, 7], align_corners=False)
    a, b = (torch.randn(*s, generator=rng(9), dtype=torch.float64) for s in ((3, 2, 8, 8), (3, 2, 6, 7)))
    left, right = (A._Read.apply(a, grid)*b).sum(), (a*A._Spread.apply(b, grid, a.shape)).sum()
    assert abs(left - right) < 1e-12
    a.requires_grad_()
    native, = torch.autograd.grad((torch.nn.functional.grid_sample(a, grid, align_corners=False)**2).sum(), a)
    ours, = torch.autograd.grad((A._Read.apply(a, grid)**2).sum(), a)
    torch.testing.assert_close(ours, native)


def test_r1_reaches_the_discriminator():
    D = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(4*100, 1)).double()
    pipe, x = A.augment_pipe("bgc"), rough(2, 12, 12, dtype=torch.float64).requires_grad_()
    def r1():
        g, = torch.autograd.grad(D(pipe(x, generator=rng(1))).sum(), x, create_graph=True)
        return g.square().sum()
    r1().backward()
    w = D[0].weight
    with torch.no_grad():
        analytic = w.grad[1, 2, 0, 1].item(); w[1, 2, 0, 1] += 1e-5
    up = r1().item()
    with torch.no_grad(): w[1, 2, 0, 1] -= 2e-5
    assert analytic == pytest.approx((up - r1().item())/2e-5, rel=1e-4)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("wrong,match", [
    (dict(xflip=-1), "xflip"), (dict(hue=math.nan), "hue"), (dict(scale_std=math.inf), "scale_std"), (dict(noise="much"), "noise"), (dict(scale=None), "scale"),
    (dict(imgfilter_bands=[1, 1, 1]), "imgfilter_bands"), (dict(imgfilter_bands=[1, 1, 1, -1]), "imgfilter_bands"), (dict(imgfilter_bands=2), "imgfilter_bands")])
def test_bad_strengths(wrong, match):
    with pytest.raises(ConfigError, match=match): A.AugmentPipe(**wrong)


def test_bad_names_images_and_p():
    with pytest.raises(ConfigError, match="bgcfnc"): A.augment_pipe("all")
    pipe, x = A.augment_pipe("bgc"), rough()
    for images in (x[:, :2], x[0], (x*127).byte(), torch.cat([x, x], 1), x[..., :1]):
        with pytest.raises(DataError, match="images"): pipe(images)
    for p in (math.nan, -.1, math.inf):
        pipe.p.fill_(p)
        with pytest.raises(ConfigError, match="probability"): pipe(x)
    pipe.p.fill_(0)
    for q in (0, 1., -1, math.nan):
        with pytest.raises(ConfigError, match="percentile"): pipe(x, debug_percentile=q)


# ---------------------------------------------------------------- the controller

def test_one_step():
    assert A.next_p(.2, .7, 128) == .2 + 128/500_000 and A.next_p(.2, .5, 128) == .2 - 128/500_000
    assert A.next_p(.2, .6, 128) == .2 and A.next_p(0., -1, 128) == 0 and A.next_p(1.7, 1, 1000, ada_kimg=100) == pytest.approx(1.71)
    assert A.next_p(.2, .8, 1000, rule="printed", gain=5) == pytest.approx(.2 + 5*.002*(.6 - .9))


@pytest.mark.parametrize("rule", ["ada", "printed"])
def test_interval_and_sums(rule):
    c, g = A.AdaController(rule=rule, p=.3, interval=3), rng()
    signs, p = [], .3
    for step in range(12):
        logits = torch.randn(16, 1, generator=g) + .2*step
        signs.append(logits.sign())
        got = c.update(logits, 16)
        if step % 3 == 2:
            r = torch.cat(signs[-3:]).mean().item()
            p = A.next_p(p, r, 48, rule=rule)
            assert c.r == pytest.approx(r, abs=1e-6)
        assert got == c.p == pytest.approx(p, abs=1e-9)
    assert A.AdaController(interval=1).update(.9, 64) == 64/500_000
    assert A.AdaController(interval=1, p=.1).update(.6, 64) == .1
    assert A.AdaController(interval=1, p=.1).update(torch.zeros(8, dtype=torch.bfloat16), 64) == .1 - 64/500_000


def test_half_a_million_images_from_0_to_1():
    c = A.AdaController()
    for _ in range(500_000//(64*4)*4): c.update(1., 64)
    assert c.p == pytest.approx(1, abs=.001) and c.leaks
    c.update(torch.tensor([]), 64)
    for _ in range(8000): c.update(1., 64)
    assert c.p > 1                                                                        # not limited from above


def test_resume_in_the_middle_of_an_interval():
    import json
    logits = [torch.randn(8, generator=rng(k)) + k % 5 - 1.5 for k in range(30)]
    whole = A.AdaController(p=.01)
    ps = [whole.update(x, 8) for x in logits]
    first = A.AdaController(p=.01)
    for x in logits[:14]: first.update(x, 8)
    second = A.AdaController()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.update(x, 8) for x in logits[14:]] == ps[14:] and second.state_dict() == whole.state_dict()
    fixed = A.AdaController(fixed=.25)
    fixed.load_state_dict(first.state_dict())
    assert fixed.p == .25
    for bad in ({}, {**first.state_dict(), "p": math.nan}, {**first.state_dict(), "p": -1}):
        with pytest.raises(DataError, match="state"): second.load_state_dict(bad)


def test_ranks_add_their_sums():
    one, ranks = A.AdaController(), [A.AdaController() for _ in range(3)]
    for step in range(4):
        logits = torch.randn(3, 8, generator=rng(step)) + .5
        one.observe(logits.flatten(), 24)
        for c, x in zip(ranks, logits): c.observe(x, 24)
    total = sum(c.sums for c in ranks)
    for c in ranks:
        c.sums = total.clone()
        assert c.due and c.adjust() == one.adjust() if c is ranks[0] else c.adjust() == one.p
    assert len({c.p for c in ranks}) == 1


def test_fixed_p_and_empty_intervals():
    c = A.AdaController(fixed=.3, interval=1)
    assert c.update(1., 64) == .3 and c.r == 1
    c = A.AdaController(p=.2, interval=1)
    assert c.update(torch.zeros(0), 64) == .2 and c.r is None


def test_controller_refuses():
    for wrong, match in ((dict(rule="eq5"), "rule"), (dict(interval=0), "interval"), (dict(target=2), "target"), (dict(target=math.nan), "target"),
                         (dict(ada_kimg=0), "ada_kimg"), (dict(gain=-1), "gain"), (dict(p=-1), "p must"), (dict(fixed=math.nan), "fixed")):
        with pytest.raises(ConfigError, match=match): A.AdaController(**wrong)
    c = A.AdaController(interval=1)
    with pytest.raises(DataError, match="not finite"): c.update(torch.tensor([1., math.nan]), 2)
    with pytest.raises(DataError, match="mean of signs"): A.AdaController().update(3.2, 2)


def test_the_working_rule_finds_the_target_and_the_printed_one_does_not():
    "D's mean logit on real images is 1.6 / (1 + 4 p): r_t = .6 at p = .225."
    def run(**kw):
        c, g = A.AdaController(ada_kimg=50, **kw), rng()
        for _ in range(3000): c.update(torch.randn(64, generator=g) + 1.6/(1 + 4*c.p), 64)
        return c
    assert abs(run().p - .2253) < .04
    assert run(rule="printed", p=.5, gain=5).p < .01

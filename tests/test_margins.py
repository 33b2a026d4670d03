"""The heads against independent references: numpy, finite differences, pytorch-metric-learning, and insightface's formulas written down again."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hyperface.core import ConfigError, DataError
from hyperface.recognition.margins import (MARGINS, AdaFace, ArcFace, CombinedMargin, CosFace, Margin, MarginHead, MarginLoss, NormalisedSoftmax, RowSGD,
                                           SphereFace, check_labels, make_margin, margin_loss, psi, sample_centres, shard_of)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def cosines(n=40, c=7, seed=0, low=-.99, high=.99):
    return torch.rand(n, c, generator=gen(seed), dtype=torch.float64) * (high - low) + low


def problem(n=24, c=9, d=16, seed=0, dtype=torch.float64):
    g = gen(seed)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(c, (n,), generator=g), torch.randn(c, d, generator=g, dtype=dtype)


# ---------------------------------------------------------------- references in plain numpy

def np_psi(phi):
    k = np.floor(phi / np.pi)
    return (-1.)**k * np.cos(phi) - 2*k


def np_target(name, cos, norms=None):
    theta = np.arccos(np.clip(cos, -1, 1))
    if name == "arcface":
        return np_psi(theta + .5)
    if name == "cosface":
        return cos - .4
    if name == "sphereface":
        return np_psi(1.7 * theta)
    if name == "combined":
        return np_psi(1.2 * theta + .3) - .1
    if name == "softmax":
        return cos
    if name == "adaface":
        z = np.clip((np.clip(norms, .001, 100) - 20) / (100 + 1e-3) * .333, -1, 1)
        return np.cos(np.clip(theta - .4 * z, 1e-3, np.pi - 1e-3)) - (.4 + .4 * z)


def heads():
    return {"arcface": ArcFace(), "cosface": CosFace(), "sphereface": SphereFace(), "combined": CombinedMargin(1.2, .3, .1), "softmax": NormalisedSoftmax(), "adaface": AdaFace().eval()}


NAMES = list(heads())


def np_logits(name, cos, labels, norms=None):
    out = cos.copy()
    rows = np.flatnonzero(labels >= 0)
    own = cos[rows, labels[rows]]
    out[rows, labels[rows]] = np_target(name, own, None if norms is None else norms[rows])
    return heads()[name].s * out


def np_loss(name, x, labels, w):
    norms = np.linalg.norm(x, axis=1)
    cos = (x / norms[:, None]) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    z = np_logits(name, cos, labels, norms)
    z = z - z.max(1, keepdims=True)
    p = z - np.log(np.exp(z).sum(1, keepdims=True))
    keep = np.flatnonzero(labels >= 0)
    return -p[keep, labels[keep]].mean()


# ---------------------------------------------------------------- values

def test_defaults_and_order_of_arguments():
    assert (ArcFace().s, ArcFace().m2) == (64, .5) and (CosFace().s, CosFace().m3) == (64, .4) and (SphereFace().s, SphereFace().m1) == (30, 1.7)
    a = AdaFace()
    assert (a.m, a.h, a.s, a.t_alpha) == (.4, .333, 64, .01) and AdaFace(.3, .2, 32., .5).s == 32
    assert (ArcFace(32, .3).s, ArcFace(32, .3).m2) == (32, .3) and (CombinedMargin(1, .2, .3).m2, CombinedMargin(1, .2, .3).m3) == (.2, .3)
    assert set(MARGINS) == {"arcface", "cosface", "sphereface", "adaface", "combined", "softmax"}


def test_values_by_hand():
    cos = torch.tensor([[.5, .2, -.1]])
    y = torch.tensor([0])
    theta = math.pi / 3
    assert torch.allclose(ArcFace()(cos, y), torch.tensor([[64 * math.cos(theta + .5), 12.8, -6.4]]))
    assert torch.allclose(CosFace()(cos, y), torch.tensor([[64 * .1, 12.8, -6.4]]))
    assert torch.allclose(SphereFace(m=4)(cos, y), torch.tensor([[30 * (-math.cos(4 * theta) - 2), 6., -3.]]))  # 4 theta = 240 degrees: k = 1, -(-.5) - 2
    assert math.isclose(SphereFace(m=4)(cos, y)[0, 0].item(), 30 * -1.5, rel_tol=1e-6)
    assert torch.allclose(CombinedMargin(1., .3, .2)(cos, y)[0, 0], torch.tensor(64 * (math.cos(theta + .3) - .2)))
    assert torch.equal(NormalisedSoftmax()(cos, y), 64 * cos)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_against_numpy(name):
    cos = cosines(60)
    y = torch.randint(-1, 7, (60,), generator=gen(1))
    norms = torch.rand(60, generator=gen(2), dtype=torch.float64) * 120
    head = heads()[name]
    c = cos.clone().requires_grad_()
    logits = head(c, y, norms=norms)
    assert np.allclose(logits.detach().numpy(), np_logits(name, cos.numpy(), y.numpy(), norms.numpy()), atol=1e-12)
    up = torch.randn(60, 7, generator=gen(3), dtype=torch.float64)
    (logits * up).sum().backward()
    h = 1e-6
    rows = np.flatnonzero(y.numpy() >= 0)
    expect = up.numpy() * head.s
    own = cos.numpy()[rows, y.numpy()[rows]]
    expect[rows, y.numpy()[rows]] *= (np_target(name, own + h, norms.numpy()[rows]) - np_target(name, own - h, norms.numpy()[rows])) / (2 * h)
    assert np.allclose(c.grad.numpy(), expect, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_against_numpy_and_finite_differences(name):
    x, y, w = problem()
    y[3] = -1
    head = heads()[name]
    assert abs(head.loss(x, y, w).item() - np_loss(name, x.numpy(), y.numpy(), w.numpy())) < 1e-12
    if name != "adaface":                                                   # whose margin follows the length, by definition without gradient
        assert torch.autograd.gradcheck(lambda a, b: head.loss(a, y[:5], b), (x[:5, :6].clone().requires_grad_(), w[:, :6].clone().requires_grad_()), atol=1e-6)
    else:
        assert torch.autograd.gradcheck(lambda b: head.loss(x[:5, :6], y[:5], b), (w[:, :6].clone().requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_is_cross_entropy_of_the_logits(name):
    x, y, w = problem(dtype=torch.float32)
    y[5] = -1
    layer = MarginHead(16, 9, heads()[name]).eval()
    layer.weight.data.copy_(w)
    results = []
    for loss in (lambda a: layer.loss(a, y), lambda a: F.cross_entropy(layer(a, y), y, ignore_index=-1)):
        a = x.clone().requires_grad_()
        layer.weight.grad = None
        value = loss(a)
        value.backward()
        results.append((value.detach(), a.grad, layer.weight.grad.clone()))
    for fused, plain in zip(*results):
        assert torch.allclose(fused, plain, rtol=1e-4, atol=2e-5)
    assert torch.equal(results[0][1][5], torch.zeros(16))
    as_loss = MarginLoss(16, 9, heads()[name])
    as_loss.weight.data.copy_(w)
    assert torch.equal(as_loss.eval()(x, y), results[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_layer_are_those_of_the_cosines(name):
    x, y, w = problem()
    y[5] = -1
    head = MarginHead(16, 9, heads()[name]).double().eval()
    head.set_whole(w)
    up = torch.randn(24, 9, generator=gen(3), dtype=torch.float64)
    a, b, v = x.clone().requires_grad_(), x.clone().requires_grad_(), w.clone().requires_grad_()
    one = head(a, y)
    two = head.margin(F.normalize(b) @ F.normalize(v).T, y, norms=b.norm(dim=1))
    (one * up).sum().backward()
    (two * up).sum().backward()
    assert torch.allclose(one, two, atol=1e-12) and torch.allclose(a.grad, b.grad, atol=1e-10) and torch.allclose(head.weight.grad, v.grad, atol=1e-10)
    assert torch.allclose(head(x), head.margin.s * head.cosine(x)) and torch.equal(head.whole(), w)
    with pytest.raises(DataError, match="shape"):
        head.set_whole(w[:3])


def test_reductions():
    x, y, w = problem()
    each = margin_loss(x, y, w, "cosface", reduction="none")
    assert each.shape == (24,) and torch.allclose(each.mean(), margin_loss(x, y, w, "cosface")) and torch.allclose(each.sum(), margin_loss(x, y, w, "cosface", reduction="sum"))
    with pytest.raises(ConfigError, match="reduction"):
        margin_loss(x, y, w, "cosface", reduction="max")


# ---------------------------------------------------------------- other libraries

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", ["arcface", "cosface", "sphereface2", "sphereface3", "sphereface4"])
def test_against_pytorch_metric_learning(which, seed):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, y, w = problem(d=4, seed=seed)                                       # four dimensions: some cosines lie beyond pi - m
    if which.startswith("sphereface"):
        x = F.normalize(x)                                                  # theirs multiplies by the length of the embedding
        m = int(which[-1])
        theirs, ours = losses.SphereFaceLoss(9, 4, margin=m, scale=30), SphereFace(s=30, m=m)
    elif which == "arcface":
        theirs, ours = losses.ArcFaceLoss(9, 4, margin=math.degrees(.5), scale=64), ArcFace(beyond="step")
    else:
        theirs, ours = losses.CosFaceLoss(9, 4, margin=.35, scale=64), CosFace(m=.35)
    theirs.W.data = w.T.clone()
    a, b, v = x.clone().requires_grad_(), x.clone().requires_grad_(), w.clone().requires_grad_()
    one, two = ours.loss(a, y, v), theirs(b, y)
    one.backward(), two.backward()
    if which.startswith("sphereface"):                                      # the length is a factor there: compare along the sphere
        b.grad -= (b.grad * x).sum(1, keepdim=True) * x
    assert abs(one.item() - two.item()) < 1e-9
    assert torch.allclose(a.grad, b.grad, atol=1e-8) and torch.allclose(v.grad, theirs.W.grad.T, atol=1e-8)


def insightface(logits, labels, m1=1., m2=.5, m3=0., s=64.):
    "What arcface_torch computes: clamp, then arccos, add, cos in place and without gradient."
    logits = logits.clamp(-1, 1)
    index = torch.where(labels != -1)[0]
    if m1 == 1 and m3 == 0:
        with torch.no_grad():
            logits[index, labels[index]] = (logits[index, labels[index]].arccos() + m2).cos()
    else:
        with torch.no_grad():
            logits[index, labels[index]] = (m1 * logits[index, labels[index]].arccos() + m2).cos() - m3
    return logits * s


@pytest.mark.parametrize("margin", [ArcFace(straight_through=True), CosFace(straight_through=True), CombinedMargin(1., .3, .2, straight_through=True)])
def test_straight_through_is_insightface(margin):
    cos = cosines(50, low=-.999, high=.999)
    y = torch.randint(-1, 7, (50,), generator=gen(4))
    up = torch.randn(50, 7, generator=gen(5), dtype=torch.float64)
    a, b = cos.clone().requires_grad_(), cos.clone().requires_grad_()
    ours, theirs = margin(a, y), insightface(b, y, margin.m1, margin.m2, margin.m3)
    assert torch.allclose(ours, theirs, atol=1e-12)
    (ours * up).sum().backward()
    (theirs * up).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-12)


def test_exact_and_straight_through_differ_by_the_slope():
    theta = torch.tensor([[1.]], dtype=torch.float64)
    grads = []
    for straight in (False, True):
        c = torch.cos(theta).requires_grad_()
        ArcFace(straight_through=straight)(c, torch.tensor([0])).sum().backward()
        grads.append(c.grad.item())
    assert math.isclose(grads[0], 64 * math.sin(1.5) / math.sin(1)) and grads[1] == 64


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_whole_sphereface_is_a_chebyshev_polynomial(m):
    c = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    polynomial = np.polynomial.chebyshev.Chebyshev([0] * m + [1])
    k = np.floor(m * np.arccos(c.numpy()) / np.pi)
    value, slope = SphereFace(m=m).target(c)
    assert np.allclose(value.numpy(), (-1)**k * polynomial(c.numpy()) - 2 * k, atol=1e-12)
    assert np.allclose(slope.numpy(), np.abs(polynomial.deriv()(c.numpy())), atol=1e-5)   # ends too: m^2


def test_annealing_as_published():
    c = cosines(200, 1)[:, 0]
    full = SphereFace(m=4).target(c)
    for lam in (5., 1000.):
        value, slope = SphereFace(m=4, lam=lam).target(c)
        assert torch.allclose(value, (lam * c + full[0]) / (1 + lam)) and torch.allclose(slope, (lam + full[1]) / (1 + lam))
    s = SphereFace(m=4)
    assert s.anneal(0) == 1000 and math.isclose(s.anneal(100), 1000 / 13) and s.anneal(10**6) == 5 == s.lam


def test_adaface_running_numbers():
    head = AdaFace(t_alpha=.25)
    cos, y = cosines(8), torch.zeros(8, dtype=torch.long)
    norms = torch.linspace(5, 40, 8)
    head(cos.float(), y, norms=norms[:, None])
    assert torch.allclose(head.batch_mean, .75 * torch.tensor([20.]) + .25 * norms.mean()) and torch.allclose(head.batch_std, .75 * torch.tensor([100.]) + .25 * norms.std())
    before = head.batch_mean.clone()
    head.eval()(cos.float(), y, norms=norms)
    assert torch.equal(head.batch_mean, before)
    head.train()(cos.float(), y, norms=torch.full((8,), math.nan))
    assert torch.equal(head.batch_mean, before)                             # a broken batch leaves no trace
    with pytest.raises(ConfigError, match="norms"):
        head(cos, y)


# ---------------------------------------------------------------- the ends of the range

EXTREMES = [ArcFace(), ArcFace(beyond="step"), ArcFace(beyond="cosine"), ArcFace(m=0.), ArcFace(m=1.5), ArcFace(straight_through=True), CosFace(), SphereFace(), SphereFace(m=4), SphereFace(m=1),
            SphereFace(m=3, lam=5.), CombinedMargin(1.2, .4, .1), NormalisedSoftmax(), AdaFace()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", EXTREMES, ids=lambda m: f"{type(m).__name__}({m.extra_repr()})")
def test_finite_at_the_ends(margin, dtype):
    one = torch.tensor(1., dtype=dtype)
    near = torch.nextafter(one, torch.tensor(0., dtype=dtype)) if dtype.itemsize > 2 else (1 - torch.finfo(dtype).eps / 2 * one)
    ends = torch.stack([one, -one, near, -near, 0 * one])
    c = torch.stack([ends, torch.zeros_like(ends)], 1).requires_grad_()
    logits = margin(c, torch.zeros(5, dtype=torch.long), norms=torch.tensor([1., 20, 40, 99, 1e4]))
    assert logits.dtype == dtype and logits.isfinite().all()
    F.cross_entropy(logits.float(), torch.zeros(5, dtype=torch.long), reduction="sum").backward()
    assert c.grad.dtype == dtype and c.grad.isfinite().all()
    if getattr(margin, "beyond", "") == "monotone" and not margin.straight_through:
        value, slope = margin.target(ends)
        assert (slope >= 0).all() and value[0] >= value[2] >= value[4] >= value[3] >= value[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_on_and_opposite_their_centre(dtype):
    w = F.normalize(torch.randn(6, 32, generator=gen()))
    for margin in (ArcFace(), SphereFace(), CosFace(), AdaFace()):
        x = torch.cat([20 * w, -20 * w]).to(dtype).requires_grad_()
        head = MarginHead(32, 6, margin)
        head.weight.data.copy_(w)
        head.loss(x, torch.arange(6).repeat(2)).backward()
        assert x.grad.dtype == dtype and x.grad.isfinite().all() and head.weight.grad.isfinite().all() and head.weight.grad.abs().max() < 1e3


def test_monotone_continuation_has_no_jump_and_no_kink():
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    for margin in (ArcFace(m=.5), ArcFace(m=1.), SphereFace(m=4), SphereFace(m=1.7), CombinedMargin(1.4, .7, .2)):
        value, slope = margin.target(torch.cos(theta))
        assert (value.diff() <= 1e-12).all() and value.diff().abs().max() < 1e-3
        by_angle = -slope * torch.sin(theta)
        assert by_angle[1:-1].diff().abs().max() < 4e-3                     # d value / d theta is continuous as well
    assert ArcFace(beyond="cosine").target(torch.tensor([-1.]))[0] > ArcFace(beyond="cosine").target(torch.tensor([-.95]))[0]


def test_no_margin_is_softmax():
    cos, y = cosines(), torch.randint(7, (40,), generator=gen())
    for margin in (ArcFace(m=0.), CosFace(m=0.), SphereFace(s=64., m=1.), CombinedMargin(1., 0., 0.), NormalisedSoftmax()):
        assert torch.allclose(margin(cos, y), 64 * cos, atol=1e-12)


def test_rounding_beyond_one_is_clamped_but_a_logit_is_refused():
    c = torch.tensor([[1.0000002, 0.]], requires_grad=True)
    ArcFace()(c, torch.tensor([0])).sum().backward()
    assert c.grad.isfinite().all() and c.grad[0, 0] > 64
    with pytest.raises(DataError, match="-1, 1"):
        ArcFace()(torch.tensor([[12., 0.]]), torch.tensor([0]))
    with pytest.raises(DataError):
        ArcFace()(torch.tensor([[math.inf, 0.]]), torch.tensor([0]))


# ---------------------------------------------------------------- labels and bad input

def test_rows_without_label_get_no_margin():
    cos = cosines(4)
    y = torch.tensor([-1, 2, -1, 0])
    for margin in (ArcFace(), CosFace(), SphereFace(m=4)):
        assert torch.equal(margin(cos, y)[[0, 2]], margin.s * cos[[0, 2]]) and margin(cos, y)[1, 2] < margin.s * cos[1, 2]


def test_all_rows_unlabelled_and_empty_batches():
    head = MarginHead(16, 9)
    x = torch.randn(3, 16, requires_grad=True)
    loss = head.loss(x, torch.full((3,), -1))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not head.weight.grad.any()
    loss = head.loss(torch.empty(0, 16), torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and head(torch.empty(0, 16)).shape == (0, 9)


@pytest.mark.parametrize("bad,word", [([0, 9], r"labels\[1\].*9 classes"), ([-2, 0], r"labels\[0\]"), ([0., 1.], "whole"), ([0], "shape"), ([[0, 1]], "shape"), ([True, False], "whole")])
def test_bad_labels(bad, word):
    x, w = torch.randn(2, 16), torch.randn(9, 16)
    head = MarginHead(16, 9)
    for call in (lambda: head(x, torch.tensor(bad)), lambda: head.loss(x, torch.tensor(bad)), lambda: ArcFace().loss(x, torch.tensor(bad), w), lambda: ArcFace()(torch.zeros(2, 9), torch.tensor(bad))):
        with pytest.raises(DataError, match=word):
            call()


def test_bad_arguments():
    for call in (lambda: ArcFace(s=0), lambda: ArcFace(m=28.6), lambda: ArcFace(m=-.1), lambda: CosFace(m=math.nan), lambda: SphereFace(m=0), lambda: SphereFace(lam=-1), lambda: ArcFace(beyond="flat"),
                 lambda: AdaFace(m=-1), lambda: make_margin("arcfaces"), lambda: make_margin("cosface", q=1), lambda: make_margin(ArcFace(), m=.3), lambda: MarginHead(0, 5), lambda: MarginHead(4, 0),
                 lambda: MarginHead(4, 5, sample_rate=0), lambda: MarginHead(4, 5, sample_rate=1.1), lambda: MarginHead(4, 5, sharded=True), lambda: SphereFace().anneal(-1), lambda: RowSGD([torch.zeros(1)], lr=-1)):
        with pytest.raises(ConfigError):
            call()
    for call in (lambda: MarginHead(4, 5).loss(torch.zeros(2, 3), torch.tensor([0, 1])), lambda: MarginHead(4, 5)(torch.zeros(4)), lambda: MarginHead(4, 5).loss(torch.zeros(2, 4, dtype=torch.long), torch.tensor([0, 1])),
                 lambda: ArcFace()(torch.zeros(3), torch.tensor([0, 0, 0])), lambda: ArcFace().loss(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(3)),
                 lambda: AdaFace()(torch.zeros(3, 2), torch.tensor([0, 0, 0]), norms=torch.zeros(2))):
        with pytest.raises(DataError):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_seen_and_stays_in_its_row(name):
    head = MarginHead(16, 9, heads()[name])
    x = torch.randn(4, 16, generator=gen())
    x[2, 3] = math.nan
    y = torch.tensor([0, 1, 2, 3])
    logits = head(x, y)
    assert logits[2].isnan().all() and logits[[0, 1, 3]].isfinite().all()
    assert head.loss(x, y).isnan()
    y[2] = -1
    loss = head.loss(x, y)                                                  # a row that is left out cannot hurt
    loss.backward()
    assert loss.isfinite() and head.weight.grad.isfinite().all()
    x[2] = 1e30                                                             # its square is beyond float32
    y[2] = 2
    assert head.loss(x, y).isnan()


def test_a_zero_vector_has_no_direction_and_no_gradient():
    head = MarginHead(16, 9)
    x = torch.randn(4, 16, generator=gen())
    x[1] = 0
    x.requires_grad_()
    with torch.no_grad():
        head.weight[4] = 0
    for loss in (head.loss(x, torch.tensor([0, 1, 4, 3])), F.cross_entropy(head(x, torch.tensor([0, 1, 4, 3])), torch.tensor([0, 1, 4, 3]))):
        x.grad = head.weight.grad = None
        loss.backward()
        assert loss.isfinite() and not x.grad[1].any() and not head.weight.grad[4].any() and head.weight.grad.isfinite().all()


def test_one_class_one_image_and_empty_classes():
    head = MarginHead(8, 1)
    x = torch.randn(5, 8, requires_grad=True)
    loss = head.loss(x, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss == 0 and not x.grad.any()
    head = MarginHead(8, 50)                                                # most classes have no image, one has one
    head.loss(x, torch.tensor([3, 3, 3, 3, 49])).backward()
    assert head.weight.grad.isfinite().all() and (head.weight.grad.norm(dim=1) > 0)[[3, 49]].all()


def test_gradients_are_tangential_and_half_precision_embeddings_work():
    x, y, w = problem(dtype=torch.float32)
    head = MarginHead(16, 9)
    head.weight.data.copy_(w)
    a = x.clone().requires_grad_()
    head.loss(a, y).backward()
    assert (a.grad * x).sum(1).abs().max() < 1e-5 and (head.weight.grad * w).sum(1).abs().max() < 1e-5
    exact = head.loss(x, y)
    for dtype, tolerance in ((torch.bfloat16, .3), (torch.float16, .03)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = x.to(dtype).requires_grad_()
            loss = head.loss(h, y)
            assert head(h).dtype == torch.float32
            loss.backward()
        assert loss.dtype == torch.float32 and abs(loss - exact) < tolerance and h.grad.dtype == dtype


def test_second_derivatives_are_refused_rather_than_wrong():
    x, y, w = problem()
    x.requires_grad_()
    for value in (ArcFace().loss(x, y, w), ArcFace()(F.normalize(x) @ F.normalize(w).T, y).sum()):
        with pytest.raises(ConfigError, match="differentiable once"):
            torch.autograd.grad(value, x, create_graph=True)


def test_fixed_centres_and_backward_twice():
    x, y, w = problem()
    x.requires_grad_()
    loss = ArcFace().loss(x, y, w)                                          # centres that are no parameter
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.allclose(x.grad, 2 * first)


# ---------------------------------------------------------------- sampled centres

@pytest.mark.parametrize("n,keep", [(100, 10), (100, 60), (100, 100), (1000, 20), (7, 1)])
def test_positives_always_kept_and_the_right_number(n, keep):
    g = gen()
    for i in range(50):
        positive = torch.randint(n, (8,), generator=g).unique()
        index = sample_centres(positive, n, keep, g)
        assert len(index) == max(min(keep, n), len(positive)) and (index.diff() > 0).all() and 0 <= index[0] and index[-1] < n
        assert torch.isin(positive, index).all()
    assert torch.equal(sample_centres(positive, n, keep, gen(7)), sample_centres(positive, n, keep, gen(7)))


@pytest.mark.parametrize("keep", [30, 200])
def test_negatives_are_uniform(keep):
    g, n, draws = gen(), 400, 3000
    positive = torch.tensor([3, 77, 399])
    count = sum(torch.bincount(sample_centres(positive, n, keep, g), minlength=n) for _ in range(draws)).double()
    assert (count[positive] == draws).all()
    others = count[~torch.isin(torch.arange(n), positive)]
    p = (keep - 3) / (n - 3)
    z = (others - draws * p) / (draws * p * (1 - p))**.5
    assert abs(z.mean()) < 1e-9 and z.abs().max() < 5 and abs(z.std() - 1) < .15


def test_sampled_loss_is_the_full_loss_on_the_kept_centres():
    x, y, w = problem(c=200, d=16)
    head = MarginHead(16, 200, "arcface", sample_rate=.1, seed=3).double()
    head.weight.data.copy_(w)
    state = head.generator.get_state()
    index, local = head.sample(y)
    assert len(index) == max(20, len(y.unique())) and torch.equal(index[local], y)
    head.generator.set_state(state)
    a, b, rows = x.clone().requires_grad_(), x.clone().requires_grad_(), w[index].clone().requires_grad_()
    sampled, full = head.loss(a, y), ArcFace().loss(b, local, rows)
    sampled.backward(), full.backward()
    grad = head.weight.grad.coalesce()
    assert torch.allclose(sampled, full) and torch.allclose(a.grad, b.grad) and torch.equal(grad.indices()[0], index) and torch.allclose(grad.values(), rows.grad)
    head.eval()
    assert torch.allclose(head.loss(x, y), ArcFace().loss(x, y, w)) and head(x).shape == (24, 200)


def test_sample_rate_one_is_the_full_head_and_row_sgd_is_sgd():
    x, y, w = problem(c=50)
    ends = []
    for rate, optimiser in ((1., torch.optim.SGD), (1., RowSGD), (1 - 1e-12, RowSGD)):      # the last one goes through the sampling, and keeps all
        head = MarginHead(16, 50, "cosface", sample_rate=rate).double()
        head.weight.data.copy_(w)
        opt = optimiser(head.parameters(), lr=.1, momentum=.9, weight_decay=1e-3)
        for step in range(5):
            opt.zero_grad()
            head.loss(x, y).backward()
            assert head.weight.grad.is_sparse == (0 < 1 - rate < 1)
            opt.step()
        ends.append(head.weight.detach().clone())
    assert torch.allclose(ends[0], ends[1], atol=1e-12) and torch.allclose(ends[0], ends[2], atol=1e-12) and not torch.allclose(ends[0], w, atol=1e-3)


def test_row_sgd_moves_only_drawn_rows_and_adds_up_gradients():
    head = MarginHead(16, 1000, sample_rate=.02)
    before = head.weight.detach().clone()
    opt = RowSGD(head.parameters(), lr=.5, weight_decay=1e-2)
    x = torch.randn(8, 16)
    head.loss(x, torch.arange(8)).backward()
    head.loss(x, torch.arange(8)).backward()                                # two samples of centres: rows twice, and rows once
    dense = head.weight.grad.to_dense()
    opt.step()
    drawn = dense.abs().sum(1) > 0
    assert 20 <= drawn.sum() <= 32 and torch.equal(head.weight[~drawn], before[~drawn])
    assert torch.allclose(head.weight[drawn], before[drawn] - .5 * (dense + 1e-2 * before)[drawn], atol=1e-6)
    p = torch.nn.Parameter(torch.tensor(2.))                                # a scalar parameter
    p.grad = torch.tensor(1.)
    RowSGD([p], lr=.5).step()
    assert p.item() == 1.5


def test_memory_of_a_sampled_step_follows_the_sample():
    sizes = []
    for rate in (.01, .1):
        head = MarginHead(32, 20_000, sample_rate=rate)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = head.loss(torch.randn(16, 32), torch.arange(16))
        loss.backward()
        grad = head.weight.grad
        sizes.append((max(kept), grad._values().numel()))
        assert max(kept) <= 32 * 20_000 * rate and grad._values().shape == (round(20_000 * rate), 32)
    assert sizes[1][0] == 10 * sizes[0][0]


def test_the_same_seed_draws_the_same_centres_and_the_state_can_be_kept():
    a, b = MarginHead(8, 500, sample_rate=.1, seed=4), MarginHead(8, 500, sample_rate=.1, seed=4)
    assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, MarginHead(8, 500, seed=5).weight)
    y = torch.arange(6)
    assert torch.equal(a.sample(y)[0], b.sample(y)[0]) and not torch.equal(a.sample(y)[0], a.sample(y)[0])
    assert list(a.state_dict()) == ["weight"] and abs(a.weight.std() - .01) < 5e-4


# ---------------------------------------------------------------- shards

def test_shards_cover_all_classes_once():
    for classes in (1, 2, 7, 10, 1000):
        for world in (1, 2, 3, 8):
            ranges = [shard_of(classes, r, world) for r in range(world)]
            assert ranges[0][0] == 0 and ranges[-1][1] == classes and all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
            assert max(b - a for a, b in ranges) - min(b - a for a, b in ranges) <= 1


CASES = [("arcface", 9), ("adaface", 9), ("sphereface", 1)]                # one class: the second rank has none

WORKER = """
import sys, torch, torch.distributed as dist
from hyperface.recognition.margins import MarginHead
rank, world, store, out, cases = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], eval(sys.argv[5])
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)         # gradients reach 1,000, whose rounding in float32 is above the tolerance
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
results = {}
for name, classes in cases:
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(12, 6, generator=g), torch.randint(classes, (12,), generator=g)
    labels[4] = -1
    torch.manual_seed(1)
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 8))
    part = slice(0, 5) if rank == 0 else slice(5, 12)                       # unequal batches
    head = MarginHead(8, classes, name, seed=2, sharded=True)
    loss = head.loss(net(images[part]), labels[part])
    loss.backward()
    plain = MarginHead(8, classes, name, seed=2, sharded=True, averaged=False)
    x = net.module(images[part]).detach().requires_grad_()
    plain.loss(x, labels[part]).backward()
    logits = head.eval()(net.module(images[part]), labels[part])
    results[name] = dict(loss=loss.detach(), weight=head.weight.detach(), grad=head.weight.grad, backbone=net.module.weight.grad.clone(), x=x.grad, logits=logits.detach(), whole=head.whole(), buffers=dict(head.named_buffers()))
    sampled = MarginHead(8, 40, name, seed=2, sharded=True, sample_rate=.5)
    value = sampled.loss(net(images[part]), labels[part].clamp(min=0) * 4)
    value.backward()
    again = value.clone()
    dist.all_reduce(again)
    assert value.isfinite() and torch.allclose(again, world * value) and sampled.weight.grad._nnz() == 10
    try:
        head.loss(net.module(images[part]), torch.full((5,), classes) if rank == 0 else torch.zeros(7, dtype=torch.long))
        raise SystemExit("labels out of range were taken")
    except ValueError:
        pass
torch.save(results, out + str(rank))
dist.destroy_process_group()
"""


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_two_ranks_equal_one(tmp_path, float64):
    (tmp_path / "worker.py").write_text(WORKER)
    ranks = [subprocess.Popen([sys.executable, tmp_path / "worker.py", str(r), "2", str(tmp_path / "store"), str(tmp_path / "out"), repr(CASES)], stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    saved = [torch.load(tmp_path / f"out{r}", weights_only=True) for r in range(2)]
    for name, classes in CASES:
        parts = [s[name] for s in saved]
        g = torch.Generator().manual_seed(0)
        images, labels = torch.randn(12, 6, generator=g), torch.randint(classes, (12,), generator=g)
        labels[4] = -1
        torch.manual_seed(1)
        net = torch.nn.Linear(6, 8)
        head = MarginHead(8, classes, name, seed=2)
        x = net(images)
        x.retain_grad()
        loss = head.loss(x, labels)
        loss.backward()
        join = lambda key: torch.cat([p[key] for p in parts])
        assert torch.equal(join("weight"), head.weight)                     # the same centres, however they are spread
        assert all(torch.equal(p["whole"], head.weight) for p in parts)
        assert all(abs(p["loss"] - loss) < 1e-5 for p in parts)
        assert torch.allclose(join("grad"), head.weight.grad, atol=1e-5)
        assert torch.allclose(join("x"), x.grad, atol=1e-5)
        assert all(torch.allclose(p["backbone"], net.weight.grad, atol=1e-5) for p in parts)
        for key, value in head.named_buffers():
            assert all(torch.allclose(p["buffers"][key], value) for p in parts)
        with torch.no_grad():
            full = head.eval()(net(images), labels)
        cut = parts[0]["logits"].shape[1]                                   # each rank has the columns of its classes
        assert torch.allclose(parts[0]["logits"], full[:, :cut], atol=1e-4) and torch.allclose(parts[1]["logits"], full[:, cut:], atol=1e-4)

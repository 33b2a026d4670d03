"AttrOP: every sample ends with a reason, alone as in company; its gradients are those of the networks it asks."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperface.core import ConfigError, DataError, torch_rng
from hyperface.vec2face.attrop import AttrOPResult, Estimator, Painter, Target, aim, attribute_sweep, attrop, fit, norm_estimator, onnx_estimators, task_estimators, window
from hyperface.vec2face.networks import GENERATION, FeatureMAE, fmae_config
from hyperface.vec2face.train import Vec2FaceFaces

D = 6


def faces(x):  # (N, 6) -> (N, 3, 4, 4): three numbers colour, one tilts from left to right, two do nothing
    ramp = torch.linspace(-1, 1, 4, device=x.device)
    return (.6 * torch.tanh(x[:, :3, None, None]) + .3 * torch.tanh(x[:, 3])[:, None, None, None] * ramp).expand(-1, -1, 4, 4)


def colour(images): return F.normalize(images.mean((2, 3)) + .9, dim=1)
def tilt(images): return (images[..., -1] - images[..., 0]).mean((1, 2)) / .6 * 90   # degrees, at most 90


YAW = Estimator(tilt, "yaw", unit="degrees", low=-90, high=90, tolerance=2., scale=90.)
RED = Estimator(lambda i: i[:, 0].mean((1, 2)), "red", low=-1, high=1, tolerance=.01, scale=1.)


def starts(n, seed=0):
    return torch.randn(n, D, generator=torch_rng(seed, "starts")) * torch.tensor([.5, .5, .5, .3, 1, 1])


def test_a_thousand_unreachable_targets_end_and_say_so():
    calls = []

    def dim(x):  # reaches 45 degrees at most
        calls.append(len(x))
        return faces(torch.cat([x[:, :3], torch.tanh(x[:, 3:4]) * np.arctanh(.5), x[:, 4:]], 1))
    x = starts(1000)
    r = attrop(dim, x, Target("yaw", YAW, 89.), colour, max_steps=7, batch=400)
    assert set(r.reason) == {"max_steps"} and not r.converged.any()
    assert (r.steps == 7).all() and max(calls) == 400 and sum(calls) == 1000 * 8 + 1           # the start, seven steps, and one probe
    assert np.isfinite(r.errors["yaw"]).all() and (r.errors["yaw"] > 44 - 1e-3).all() and r.vectors.shape == (1000, D)


def test_reachable_targets_converge_and_the_result_is_what_it_says():
    x = starts(40)
    wanted = np.linspace(-60, 60, 40)
    wanted[5] = np.nan
    r = attrop(faces, x, [Target("yaw", YAW, wanted), Target("red", RED, .1, weight=3., tolerance=.02)], colour, max_steps=120, batch=16)
    assert r.converged.all() and set(r.reason) == {"converged"} and r.steps.max() <= 120
    again = faces(r.vectors)
    assert torch.allclose(again, r.images, atol=1e-6)
    yaw = tilt(again).numpy()
    known = ~np.isnan(wanted)
    assert np.abs(yaw - wanted)[known].max() <= 2 + 1e-4 and np.isnan(r.errors["yaw"][5]) and np.isfinite(r.errors["red"]).all()
    assert np.allclose(r.errors["yaw"][known], np.abs(yaw - wanted)[known], atol=1e-3)
    assert np.allclose(r.similarity, (colour(again) * colour(faces(x))).sum(1).numpy(), atol=1e-5) and r.similarity.min() >= .7
    assert torch.equal(r.vectors[:, 4:], x[:, 4:])                                                # what does nothing is not moved
    assert len(r.frame()) == 40 and r.frame().reason[0] == "converged" and "40 converged" in repr(r) and "<table" in r._repr_html_()


def test_a_sample_knows_nothing_of_the_others():
    x = starts(9, 1)
    wanted = np.array([5., 30, -40, 89.9, 0, np.nan, 20, -89.9, 60])
    whole = attrop(faces, x, Target("yaw", YAW, wanted), colour, max_steps=30)
    assert {"converged", "max_steps"} <= set(whole.reason)
    for options in (dict(batch=1), dict(batch=4)):
        part = attrop(faces, x, Target("yaw", YAW, wanted), colour, max_steps=30, **options)
        assert torch.allclose(part.vectors, whole.vectors, atol=1e-4) and (part.steps == whole.steps).all()
    order = np.array([3, 0, 8, 1])
    some = attrop(faces, x[order], Target("yaw", YAW, wanted[order]), colour, max_steps=30)
    assert torch.allclose(some.vectors, whole.vectors[order], atol=1e-4) and (some.reason == whole.reason[order]).all()


def test_converged_rows_leave_the_batch_and_are_not_moved():
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return faces(x)
    x = starts(6, 2)
    now = tilt(faces(x)).numpy()
    r = attrop(counted, x, Target("yaw", YAW, np.where(np.arange(6) < 5, now, 89.9)), colour, max_steps=10)
    assert torch.equal(r.vectors[:5], x[:5]) and (r.steps[:5] == 0).all() and r.converged[:5].all()
    assert sizes == [1, 6] + [1] * 10


def test_the_path_is_that_of_torchs_adam():
    x = starts(1, 3)
    r = attrop(faces, x, Target("yaw", YAW, 89.9), colour, max_steps=9, lr=.07, min_similarity=-1., identity_weight=2.)
    own = x.clone().requires_grad_()
    home = colour(faces(x))
    adam = torch.optim.Adam([own], .07)
    for _ in range(9):
        images = faces(own)
        loss = (2 * (1 - (colour(images) * home).sum(1)) + (tilt(images) - 89.9).abs() / 90).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert torch.allclose(r.vectors, own.detach(), atol=1e-5) and r.best_step[0] == 9


def test_the_best_is_returned_not_the_last():
    x = torch.zeros(1, D)
    x[:, :3] = .2
    call = lambda n: attrop(faces, x, Target("yaw", YAW, 40., tolerance=.01), colour, max_steps=n, lr=1.3)   # swings round the target
    r, path = call(12), [float(call(n).errors["yaw"][0]) for n in range(1, 13)]
    assert r.reason[0] == "max_steps" and 0 < r.best_step[0] < 12
    assert path == sorted(path, reverse=True) and r.errors["yaw"][0] == path[-1]


def test_identity_stands_in_the_way():
    x = starts(8, 4)
    far = RED
    free = attrop(faces, x, Target("red", far, .55), colour, max_steps=200, min_similarity=-1., identity_weight=0.)
    assert free.converged.all()
    bound = float(free.similarity.max()) + (1 - float(free.similarity.max())) / 2
    r = attrop(faces, x, Target("red", far, .55), colour, max_steps=200, min_similarity=bound, identity_weight=0.)
    assert set(r.reason) == {"identity"} and (r.similarity >= bound - 1e-5).all()
    assert (r.errors["red"] <= np.abs(.55 - RED(faces(x)).numpy()) + 1e-6).all()
    other = torch.tensor([[-1., 1., -1.]]).expand(8, -1)                                           # somebody whom no face resembles
    assert set(attrop(faces, x, Target("yaw", YAW, 5.), colour, max_steps=3, min_similarity=.99, reference=other).reason) == {"identity"}


def test_a_reference_is_kept_instead_of_the_start():
    x, reference = starts(4, 5), colour(faces(starts(4, 6)))
    r = attrop(faces, x, Target("yaw", YAW, 20.), colour, reference=3 * reference, min_similarity=.5, max_steps=60)
    assert np.allclose(r.similarity, (colour(r.images) * reference).sum(1).numpy(), atol=1e-5)


@pytest.mark.parametrize("where", ["image", "gradient"])
def test_what_is_not_finite_ends_alone(where):
    def broken(x):
        bad = (x[:, 5] > 90)[:, None, None, None]
        if where == "image":
            return torch.where(bad & (x[:, 3] > .01)[:, None, None, None], np.nan, faces(x))
        nothing = torch.where(x[:, 5] > 90, x[:, 5] - x[:, 5].detach(), 1.).sqrt()[:, None, None, None]            # 0 there, its slope is infinite
        return faces(x) + torch.where(bad, nothing, 0.)
    x = starts(5, 7)
    x[2, 5], x[2, 3] = 100., 0.
    r = attrop(broken, x, Target("yaw", YAW, 30.), colour, max_steps=40)
    assert r.reason.tolist() == ["converged"] * 2 + ["not finite"] + ["converged"] * 2
    assert torch.isfinite(r.vectors).all() and torch.equal(r.vectors[2], x[2]) and np.isfinite(r.similarity[2]) and torch.isfinite(r.images).all()
    if where == "image":                                                                            # from the start
        x[2, 3] = 1.
        r = attrop(broken, x, Target("yaw", YAW, 30.), colour)
        assert r.reason[2] == "not finite" and np.isnan(r.similarity[2]) and torch.equal(r.vectors[2], x[2]) and r.steps[2] == 0 and r.converged.sum() == 4


def test_classes_and_relations():
    x = starts(6, 8)
    logits = Estimator(lambda i: 8 * i.mean((2, 3)), "hue", classes=("red", "green", "blue"))
    names = ["red", "green", None, "blue", 0, 2]
    r = attrop(faces, x, Target("hue", logits, names), colour, max_steps=150, min_similarity=.5, identity_weight=.1)
    p = logits(r.images).softmax(1).numpy()
    assert r.converged.all() and np.isnan(r.errors["hue"][2]) and r.steps[2] == 0
    for k, c in ((0, 0), (1, 1), (3, 2), (4, 0), (5, 2)):
        assert p[k, c] >= .5 - 1e-5 and abs(r.readings["hue"][k] - p[k, c]) < 1e-5 and abs(r.errors["hue"][k] - (1 - p[k, c])) < 1e-5
    low = attrop(faces, x, Target("yaw", YAW, -90., relation="at_least"), colour)
    assert low.converged.all() and (low.steps == 0).all() and (low.errors["yaw"] == 0).all()
    high = attrop(faces, x, Target("yaw", YAW, -10., relation="at_most"), colour, max_steps=80)
    assert high.converged.all() and (high.readings["yaw"] <= -10 + 2 + 1e-4).all()


def test_the_border_belongs_to_the_target():
    flat = Estimator(lambda i: i[:, 0].mean((1, 2)) * 0 + .25, "level", tolerance=.25)
    x = starts(2)
    assert attrop(faces, x, Target("level", flat, .5), colour).converged.all()
    assert not attrop(faces, x, Target("level", flat, .5, tolerance=.2499), colour, max_steps=1).converged.any()


def test_a_shared_trunk_runs_once():
    runs = []

    def trunk(images):
        runs.append(len(images))
        return torch.stack([tilt(images), images.mean((1, 2, 3))], 1)
    both = [Estimator(trunk, "yaw", lambda o: o[:, 0]), Estimator(trunk, "light", lambda o: o[:, 1])]
    attrop(faces, starts(3), aim(both, yaw=89.9, light=0.), colour, max_steps=4)
    assert runs == [1, 3, 3, 3, 3, 3]


def tiny(dim=16):
    torch.manual_seed(1)
    return FeatureMAE(fmae_config("tiny", feature_dim=dim, grid=4)).eval()


def look(images): return F.normalize(F.adaptive_avg_pool2d(images, 4).flatten(1), dim=1)


BRIGHT = Estimator(lambda i: i.mean((1, 2, 3)), "brightness", low=-1, high=1, tolerance=.01, scale=.1)


def test_masked_autoencoder_alone_as_in_company_and_again():
    model, x = tiny(), 4 * torch.randn(5, 16, generator=torch_rng(0, "v"))
    with torch.no_grad():
        goal = BRIGHT(model(x, masking=None)[0]) + .03
    whole = attrop(model, x, Target("b", BRIGHT, goal), look, max_steps=15, seed=3)
    again = attrop(model, x, Target("b", BRIGHT, goal), look, max_steps=15, seed=3)
    assert torch.equal(whole.vectors, again.vectors) and torch.equal(whole.images, again.images)
    alone = attrop(model, x[4:], Target("b", BRIGHT, goal[4:]), look, max_steps=15, seed=3)
    assert torch.allclose(alone.vectors, whole.vectors[4:], atol=1e-4) and torch.allclose(alone.images, whole.images[4:], atol=1e-4)
    other = attrop(model, x, Target("b", BRIGHT, goal), look, max_steps=15, seed=4)
    assert (whole.images - other.images).abs().max() > 1e-3
    anew = attrop(model, x, Target("b", BRIGHT, goal), look, max_steps=15, seed=3, redraw=True)
    assert not torch.equal(anew.vectors, whole.vectors)
    twins = attrop(model, x[:1].expand(2, -1), Target("b", BRIGHT, goal[:1].expand(2)), look, max_steps=2, names=["one", "two"])
    assert not torch.equal(twins.images[0], twins.images[1])
    assert whole.converged.any() and all(p.grad is None for p in model.parameters())


def test_a_generator_of_unit_vectors_stays_on_the_sphere():
    model, e = tiny(), F.normalize(torch.randn(3, 16, generator=torch_rng(0, "e")), dim=1)
    generator = Vec2FaceFaces(model, masking=None)
    r = attrop(generator, e, Target("b", BRIGHT, .05), look, max_steps=5)
    assert torch.allclose(r.vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(generator.generate(r.vectors), r.images, atol=1e-4)


def test_modules_come_back_as_they_were():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(.5)).train()
    before = network[1].running_mean.clone()
    attrop(faces, starts(4), Target("yaw", YAW, 20.), network, max_steps=2)
    assert network.training and network[1].training and network[2].training and torch.equal(network[1].running_mean, before)


def test_nothing_to_do():
    r = attrop(faces, torch.zeros(0, D), Target("yaw", YAW, 10.), colour)
    assert isinstance(r, AttrOPResult) and len(r) == 0 and r.vectors.shape == (0, D) and "0 samples" in repr(r) and r._repr_html_()
    assert attrop(faces, starts(2), Target("yaw", YAW, 10.), colour, keep_images=False).images is None


def argmax(images): return images.flatten(1).argmax(1).float()


class Deaf(nn.Module):
    "Its output hangs on its weights, not on the picture."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images): return images.detach().mean((1, 2, 3)) * self.weight


@pytest.mark.parametrize("call, error, says", [
    (lambda x: Target("yaw", YAW, 200), ConfigError, r"yaw must lie in \[-90, 90\] degrees \(got 200"),
    (lambda x: Target("yaw", YAW, [0., 95.]), ConfigError, "yaw must lie in"),
    (lambda x: Target("yaw", YAW, np.inf), ConfigError, "yaw must lie in"),
    (lambda x: Target("yaw", YAW, "left"), ConfigError, "yaw must be a number"),
    (lambda x: Target("yaw", YAW, 3, tolerance=-1), ConfigError, "tolerance of yaw"),
    (lambda x: Target("yaw", YAW, 3, scale=0), ConfigError, "scale of yaw"),
    (lambda x: Target("yaw", YAW, 3, relation="near"), ConfigError, "relation of yaw"),
    (lambda x: Target("hue", colour, 3, classes=("a", "b")), ConfigError, "hue must be a class"),
    (lambda x: Target("hue", colour, "c", classes=("a", "b")), ConfigError, "no class 'c'"),
    (lambda x: aim([YAW], yow=3), ConfigError, "unknown target 'yow'. There are estimators of: yaw"),
    (lambda x: attrop(faces, x, [], colour), ConfigError, "no target"),
    (lambda x: attrop(faces, x, ["yaw"], colour), ConfigError, "unknown target"),
    (lambda x: attrop(faces, x, [Target("yaw", YAW, 1)] * 2, colour), ConfigError, "named twice"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, [1., 2.]), colour), DataError, "values for 2 samples, there are 3"),
    (lambda x: attrop(faces, x * torch.tensor([[1.], [np.nan], [1.]]), Target("yaw", YAW, 1), colour), DataError, r"not finite in row \(got 1\)"),
    (lambda x: attrop(faces, x[0], Target("yaw", YAW, 1), colour), DataError, r"vectors must be \(N, D\)"),
    (lambda x: attrop(tiny(), x, Target("b", BRIGHT, 0), look), DataError, r"vectors must be \(N, 16\)"),
    (lambda x: attrop(nn.Linear(7, 3), x, Target("b", BRIGHT, 0), look), DataError, "does not take vectors of 6"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, max_steps=0), ConfigError, "max_steps"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, max_steps=2.5), ConfigError, "max_steps"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, lr=0), ConfigError, "lr must"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, lr=np.nan), ConfigError, "lr must"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, batch=0), ConfigError, "batch"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, min_similarity=1.2), ConfigError, "min_similarity"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, names=["a"]), DataError, "names must be 3"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, reference=torch.ones(2, 3)), DataError, "reference must have a row"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), colour, reference=torch.ones(3, 5)), DataError, r"reference must be \(N, 3\)"),
    (lambda x: attrop(faces, x * 0, Target("yaw", YAW, 1), colour, keep_norm=True), DataError, "length 0"),
    (lambda x: attrop(faces, x, Target("a", argmax, 1), colour), ConfigError, "estimator of a carries no gradient"),
    (lambda x: attrop(faces, x, Target("d", Deaf(), 1), colour), ConfigError, "estimator of d carries no gradient"),
    (lambda x: attrop(faces, x, Target("d", torch.no_grad()(tilt), 1), colour), ConfigError, "estimator of d carries no gradient"),
    (lambda x: attrop(torch.no_grad()(faces), x, Target("yaw", YAW, 1), colour), ConfigError, "generator carries no gradient"),
    (lambda x: attrop(faces, x, Target("yaw", YAW, 1), torch.no_grad()(colour)), ConfigError, "recogniser carries no gradient"),
    (lambda x: attrop(faces, x, Target("c", colour, 1), colour), DataError, "name the classes"),
    (lambda x: task_estimators(nn.Linear(2, 2)), ConfigError, "no task heads"),
    (lambda x: onnx_estimators("beard"), ConfigError, "no estimator of 'beard'"),
])
def test_nonsense_is_refused_by_name(call, error, says):
    with pytest.raises(error, match=says):
        call(starts(3))


def test_sweep_counts_what_attrop_says():
    table, results = attribute_sweep(faces, starts(10), YAW, (-20, 0, 89.9), colour, max_steps=14)
    assert table.yaw.tolist() == [-20, 0, 89.9] and list(results) == [-20, 0, 89.9]
    for row, r in zip(table.itertuples(), results.values()):
        assert row.converged_rate == r.converged.mean() and row.low <= row.converged_rate <= row.high and row.max_steps == (r.reason == "max_steps").sum()
    assert table.converged_rate[:2].min() > .5 and table.converged_rate[2] == 0


def test_sizes_and_windows_are_those_of_the_readers():
    from hyperface.extraction.attributes import view
    from hyperface.extraction.embed import as_input
    for side, size in ((112, 64), (64, 112), (60, 35), (128, 64)):
        x = torch.rand(2, 3, side, side, generator=torch_rng(side, "x")) * 2 - 1
        assert np.abs(fit(x, size).numpy() - as_input(x, size)).max() < 2e-4, (side, size)
    x = F.interpolate(torch.rand(2, 3, 20, 20, generator=torch_rng(0, "x")), (112, 112), mode="bilinear") * 2 - 1
    for zoom in (.8, 1.2):
        assert np.abs(window(x, 64, zoom).numpy() - view(x.numpy(), 64, zoom)[0]).max() < .02


def test_own_heads_follow_the_conventions_of_their_page():
    from hyperface.recognition.multitask import expected_age, pose_degrees, pose_matrix
    from hyperface.recognition.train import Recogniser, recipe
    network = Recogniser(recipe("cpu_quick", tasks=("pose", "age", "gender"), task_weights=(1., 1., 1.), image_size=32, embedding_dim=16), 4).eval()
    mine = task_estimators(network)
    assert list(mine) == ["yaw", "pitch", "roll", "age", "gender"] and mine["gender"].classes == ("female", "male") and mine["yaw"].trunk is mine["age"].trunk
    pose = torch.tensor([[50., -20, 10], [-85, 35, -60]])
    assert torch.allclose(torch.stack([mine[k].read(dict(pose=pose_matrix(pose))) for k in ("yaw", "pitch", "roll")], 1), pose, atol=1e-3)
    x = torch.rand(3, 3, 64, 64, generator=torch_rng(0, "x")) * 2 - 1
    with torch.no_grad():
        said = network.tasks(network.embed(F.avg_pool2d(x, 2)))
        assert torch.allclose(mine["age"](x), expected_age(said["age"]), atol=1e-3) and torch.allclose(mine["pitch"](x), pose_degrees(said["pose"])[:, 1], atol=1e-3)
    quality = norm_estimator(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    assert torch.allclose(quality(x), F.adaptive_avg_pool2d(F.interpolate(x, (112, 112), mode="bilinear"), 2).flatten(1).norm(dim=1), atol=1e-4) and quality.relation == "at_least"


@pytest.mark.parametrize("name", ["yaw", "age", "gender", "expression"])
def test_onnx_estimators_agree_with_the_readers_and_have_the_slope_of_their_curve(arcface, name):
    from hyperface.data.rendered import render_faces
    from hyperface.extraction.attributes import load_attribute_model
    x = torch.from_numpy(render_faces(4, 1, size=112, seed=5).images())
    estimator = onnx_estimators(name)[name]
    with torch.no_grad():
        mine = estimator(x)
    read = load_attribute_model(dict(yaw="pose", age="age_gender", gender="age_gender", expression="expression")[name], 1).predict(x)
    if name == "yaw":
        assert np.abs(mine.numpy() - read.yaw).max() < .2
    elif name == "age":
        assert np.abs(mine.numpy() - read.age).max() < 6                                            # summed, not counted
    elif name == "gender":
        assert (np.array(estimator.classes)[mine.argmax(1)] == read.gender).all()
    else:
        assert np.abs(mine.exp().numpy() - read.filter(like="p_").to_numpy()).max() < 2e-3
    number = (lambda v: estimator(v)) if mine.ndim == 1 else (lambda v: estimator(v)[:, 0])
    d = F.interpolate(torch.randn(4, 3, 7, 7, generator=torch_rng(0, "slope")), (112, 112), mode="bilinear") * .1
    v = x.clone().requires_grad_()
    slope = (torch.autograd.grad(number(v).sum(), v)[0] * d).sum((1, 2, 3))
    with torch.no_grad():
        quotient = (number(x + .002 * d) - number(x - .002 * d)) / .004
    assert slope.abs().max() > .01 and (slope - quotient).abs().max() < .06 * slope.abs().max() + .005


def test_masks_of_a_row_do_not_know_the_batch():
    model = tiny()
    names = [f"n{i}" for i in range(20)]
    rows, none = torch.arange(20), torch.zeros(20, dtype=torch.long)
    drop, hidden = Painter(model, GENERATION, False, 0, names).masks(rows, none)
    back = Painter(model, GENERATION, False, 0, names[::-1]).masks(rows.flip(0), none + 5)
    assert torch.equal(back[0], drop) and torch.equal(back[1], hidden) and (drop <= hidden).all()
    assert len(set(hidden.sum(1).tolist())) > 2                                                     # each row has its own share
    one, two = (Painter(model, GENERATION, True, 0, names).masks(rows, none + s)[1] for s in (0, 1))
    assert not torch.equal(one, two)

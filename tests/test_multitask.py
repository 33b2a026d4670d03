"""The HyperFace loss and demographic attention: masks, angles, expectations, weights, gates."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from hyperface.core import ConfigError, DataError
from hyperface.data.head import EXPRESSIONS
from hyperface.data.records import Records
from hyperface.recognition.attention import AttentionConfig, DemographicAttention, group_loss, group_posterior, insert_attention
from hyperface.recognition.backbones import create_model, export_onnx, from_pretrained, save_pretrained
from hyperface.weights import load_strict
from hyperface.recognition.multitask import (AGES, CLASSES, TASKS, WEIGHTS, HyperFaceLoss, MultiTaskHeads, age_loss, expected_age, geodesic, label_mask, pose_degrees,
                                             pose_matrix, rotation_6d, task_errors, task_labels, task_loss, task_metrics)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_labels(n=12, seed=0, missing=0.):
    g = np.random.default_rng(seed)
    labels = dict(pose=torch.tensor(g.uniform(-60, 60, (n, 3)), dtype=torch.float32), age=torch.tensor(g.uniform(1, 90, n), dtype=torch.float32),
                  expression=torch.tensor(g.integers(0, 8, n)), gender=torch.tensor(g.integers(0, 2, n)), ethnicity=torch.tensor(g.integers(0, 5, n)), identity=torch.tensor(g.integers(0, 3, n)))
    for name, v in labels.items():
        gone = torch.tensor(g.random(n) < missing)
        labels[name] = torch.where(gone.view(-1, *[1]*(v.ndim - 1)), torch.nan if v.is_floating_point() else -1, v)
    return labels


def test_geodesic_is_scipys_angle():
    a, b = Rotation.random(500, rng=np.random.default_rng(0)), Rotation.random(500, rng=np.random.default_rng(1))
    ours = geodesic(torch.tensor(a.as_matrix()), torch.tensor(b.as_matrix()))
    assert np.allclose(ours, (a*b.inv()).magnitude(), atol=1e-9)
    small = Rotation.from_rotvec(np.outer(np.geomspace(1e-6, 3.14159, 50), [.6, 0, .8]))
    ours = geodesic(torch.tensor(small.as_matrix(), dtype=torch.float32), torch.eye(3).expand(50, 3, 3))
    assert np.allclose(ours, small.magnitude(), rtol=1e-3, atol=1e-6)


def test_geodesic_gradient_is_one_turn_per_turn_and_finite_at_the_ends():
    angle = torch.tensor([1e-3, .5, 3.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    turned = pose_matrix(torch.stack([torch.rad2deg(angle), zero, zero], 1))
    geodesic(turned, torch.eye(3, dtype=torch.float64).expand(3, 3, 3)).sum().backward()
    assert torch.allclose(angle.grad, torch.ones(3, dtype=torch.float64), atol=1e-6)
    for degrees in (0., 180.):
        m = pose_matrix(torch.tensor([[degrees, 0., 0.]])).requires_grad_()
        geodesic(m, torch.eye(3)[None]).sum().backward()
        assert torch.isfinite(m.grad).all()


def test_rotation_6d_makes_rotations_and_keeps_those_it_gets():
    r = rotation_6d(torch.randn(100, 6, generator=generator(), dtype=torch.float64))
    assert torch.allclose(r @ r.mT, torch.eye(3, dtype=torch.float64).expand(100, 3, 3), atol=1e-6) and torch.allclose(torch.linalg.det(r), torch.ones(100, dtype=torch.float64), atol=1e-6)
    known = torch.tensor(Rotation.random(20, rng=np.random.default_rng(0)).as_matrix())
    assert torch.allclose(rotation_6d(torch.cat([known[:, :, 0], known[:, :, 1]], 1)), known, atol=1e-9)
    six = torch.zeros(2, 6, requires_grad=True)  # nothing to make a rotation of: finite all the same
    rotation_6d(six).sum().backward()
    assert torch.isfinite(six.grad).all()


def test_pose_convention_is_the_heads_and_its_inverse():
    pose = torch.tensor(np.random.default_rng(0).uniform([-175, -85, -175], [175, 85, 175], (200, 3)))
    turn = lambda axis, degrees: Rotation.from_euler(axis, degrees.numpy()[:, None], degrees=True)
    expected = (turn("z", -pose[:, 2])*turn("x", -pose[:, 1])*turn("y", pose[:, 0])).as_matrix()
    assert np.allclose(pose_matrix(pose), expected, atol=1e-9)
    assert torch.allclose(pose_degrees(pose_matrix(pose)), pose, atol=1e-6)
    nose = pose_matrix(torch.tensor([[30., 0, 0], [0, 20, 0]])) @ torch.tensor([0., 0, 1])  # the face looks along z
    assert nose[0, 0] > 0 and nose[1, 1] > 0  # yaw to the image's right, pitch upwards


def test_age_expectation_and_loss_by_hand():
    logits = torch.randn(6, AGES, generator=generator())
    p = np.exp(logits.numpy().astype(float))
    p /= p.sum(1, keepdims=True)
    assert np.allclose(expected_age(logits), p @ np.arange(101), atol=1e-4)
    ages = np.array([0, 12.25, 50, 99.5, 100, 117])
    by_hand = []
    for row, age in zip(p, np.minimum(ages, 100)):
        low = min(int(age), 99)
        by_hand.append(-(1 - (age - low))*np.log(row[low]) - (age - low)*np.log(row[low + 1]) + .1*abs(row @ np.arange(101) - age))
    assert np.allclose(age_loss(logits, torch.tensor(ages)), by_hand, atol=1e-4)
    assert not torch.isnan(age_loss(torch.full((2, AGES), 1e4), torch.tensor([5., 6.]))).any()


def test_half_of_all_labels_missing_is_the_mean_over_the_rest():
    labels, heads = some_labels(40, missing=.5), MultiTaskHeads(16, seed=1)
    features = torch.randn(40, 16, generator=generator(), requires_grad=True)
    outputs = heads(features)
    total, report = HyperFaceLoss()(outputs, labels)
    for task in TASKS:
        known = label_mask(task, labels[task])
        assert 0 < known.sum() < 40 and report[task]["count"] == int(known.sum())
        alone = [task_loss(task, outputs[task][i:i + 1], labels[task][i:i + 1])[0] for i in torch.nonzero(known)[:, 0]]
        assert report[task]["loss"] == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)
    assert float(total) == pytest.approx(sum(WEIGHTS[t]*report[t]["loss"] for t in TASKS), rel=1e-5)
    total.backward()
    reached = features.grad.abs().sum(1) > 0
    anything = torch.stack([label_mask(t, labels[t]) for t in TASKS]).any(0)
    assert torch.equal(reached, anything) and torch.isfinite(features.grad).all()


@pytest.mark.parametrize("mode", ["fixed", "learnt"])
def test_all_labels_missing_is_zero_without_nan(mode):
    labels = some_labels(5, missing=1.1)
    features = torch.randn(5, 16, generator=generator(), requires_grad=True)
    loss, heads = HyperFaceLoss(mode=mode, identity=lambda f, y: F.cross_entropy(f, y)), MultiTaskHeads(16)
    total, report = loss(heads(features), labels, features=features)
    total.backward()
    assert float(total) == 0 and not features.grad.any() and {r["count"] for r in report.values()} == {0}
    assert all(p.grad is not None and not p.grad.any() for p in [*heads.parameters(), *loss.parameters()])


def test_identity_term_sees_known_identities_only():
    labels = some_labels(8)
    labels["identity"] = torch.tensor([0, -1, 1, 2, -1, 0, 1, 2])
    features = torch.randn(8, 16, generator=generator(), requires_grad=True)
    seen = []
    def margin(f, y):
        seen.append((len(f), y.tolist()))
        return F.cross_entropy(f, y)
    total, report = HyperFaceLoss(tasks=("age",), weights=dict(identity=2., age=0.), identity=margin)(MultiTaskHeads(16, ("age",))(features), labels, features=features)
    assert seen == [(6, [0, 1, 2, 0, 1, 2])] and report["identity"]["count"] == 6
    assert float(total) == pytest.approx(2*report["identity"]["loss"], rel=1e-5)
    total.backward()
    assert not features.grad[[1, 4]].any() and features.grad[0].any()


def test_uncertainty_weights_follow_kendall():
    labels, outputs = some_labels(10), MultiTaskHeads(16, seed=2)(torch.randn(10, 16, generator=generator()))
    outputs = {t: v.detach() for t, v in outputs.items()}
    loss = HyperFaceLoss(mode="learnt")
    total, report = loss(outputs, labels)
    assert {t: pytest.approx(r["weight"], rel=1e-5) for t, r in report.items()} == {t: WEIGHTS[t] for t in TASKS}  # starts at the fixed weights
    s = {t: float(loss.log_variance[t].detach()) for t in TASKS}
    expected = sum((.5 if t in ("pose", "age") else 1)*math.exp(-s[t])*report[t]["loss"] + s[t]/2 for t in TASKS)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    total.backward()
    for t in TASKS:
        assert float(loss.log_variance[t].grad) == pytest.approx(.5 - report[t]["weight"]*report[t]["loss"], abs=1e-5)


def test_schedule_weights_and_errors():
    loss = HyperFaceLoss(schedule=dict(age=(10, 20), pose=(5, 5)))
    assert [loss.factor("age", s) for s in (0, 10, 15, 20, 99)] == [0, 0, .5, 1, 1] and [loss.factor("pose", s) for s in (4, 5)] == [0, 1] and loss.factor("gender", 0) == 1
    assert HyperFaceLoss(schedule=lambda task, step: step/100).factor("age", 25) == .25
    labels, outputs = some_labels(4), MultiTaskHeads(8)(torch.randn(4, 8, generator=generator()))
    assert loss(outputs, labels, step=0)[1]["age"]["weight"] == 0 and loss(outputs, labels)[1]["age"]["weight"] == WEIGHTS["age"]
    for wrong in (dict(mode="random"), dict(weights=dict(mood=1)), dict(weights=dict(age=-1)), dict(weights=dict(age=math.nan)), dict(mode="learnt", weights=dict(age=0)), dict(tasks=("mood",)), dict(tasks=("age", "age"))):
        with pytest.raises(ConfigError):
            HyperFaceLoss(**wrong)
    with pytest.raises(ConfigError, match="neither"):
        loss({}, labels)
    for task, wrong in (("age", torch.tensor([1., 2, 3, -4])), ("gender", torch.tensor([0, 1, 2, 0])), ("pose", torch.zeros(3, 3))):
        with pytest.raises(DataError):
            task_loss(task, outputs[task], wrong)
    with pytest.raises(DataError, match=r"\(N, 8\)"):
        MultiTaskHeads(8)(torch.zeros(2, 9))
    with pytest.raises(ConfigError, match="different names"):
        MultiTaskHeads(8, classes=dict(expression=["happy", "happy"]))


def test_labels_of_records():
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    records = Records.from_arrays(pixels, identity=["b", "a", "b", None], age=[10, np.nan, 30, 40], gender=["male", "female", None, "male"], expression=["contempt", "happy", None, "neutral"],
                                  yaw=[1, 2, 3, np.nan], pitch=[0, 0, 0, 0], roll=[0, 0, np.nan, 0])
    labels = task_labels(records)
    assert labels["identity"].tolist() == [1, 0, 1, -1] and labels["gender"].tolist() == [1, 0, -1, 1] and labels["ethnicity"].tolist() == [-1]*4
    assert labels["expression"].tolist() == [list(EXPRESSIONS).index("contempt"), list(EXPRESSIONS).index("happy"), -1, 0]
    assert label_mask("pose", labels["pose"]).tolist() == [True, True, False, False] and label_mask("age", labels["age"]).tolist() == [True, False, True, True]
    seven = [e for e in EXPRESSIONS if e != "contempt"]
    with pytest.raises(DataError, match="contempt"):
        task_labels(records, classes=dict(expression=seven))
    assert task_labels(records, classes=dict(expression=seven), unknown="missing")["expression"].tolist() == [-1, 1, -1, 0]
    assert task_labels(records, identities=["x", "b", "a"])["identity"].tolist() == [1, 2, 1, -1]
    with pytest.raises(DataError, match="identity"):
        task_labels(records, identities=["a"])
    assert MultiTaskHeads(8, classes=dict(expression=seven))(torch.zeros(1, 8))["expression"].shape == (1, 7)
    assert set(task_labels(pd.DataFrame(dict(image=["x"])), tasks=("age",))) == {"age"}


def test_metrics_count_what_is_known():
    labels = some_labels(60, missing=.5)
    right = dict(pose=pose_matrix(labels["pose"].nan_to_num() + torch.tensor([4., 0, 0])), age=torch.log(torch.clamp(F.one_hot(labels["age"].nan_to_num().round().long() + 2, AGES).float(), 1e-12)),
                 **{t: F.one_hot(labels[t].clamp(min=0), len(CLASSES[t])).float() for t in CLASSES})
    m = task_metrics(right, labels)
    assert m["gender_rate"] == m["ethnicity_rate"] == m["expression_rate"] == 1 and m["pose_deg"] == pytest.approx(4, abs=1e-2) and m["yaw_deg"] == pytest.approx(4, abs=1e-2) and m["pitch_deg"] < 1e-2
    assert m["age_error"] == pytest.approx(float((labels["age"].round() + 2 - labels["age"]).nanmean()), abs=1e-3)
    assert all(m[f"{t}_count"] == int(label_mask(t, labels[t]).sum()) for t in TASKS)
    each = task_errors(right, labels)
    assert all(np.array_equal(np.isfinite(each[t]), label_mask(t, labels[t]).numpy()) for t in TASKS)
    assert math.isnan(task_metrics(right, some_labels(60, missing=1.1))["age_error"])


def test_heads_learn_under_all_weightings():
    g = np.random.default_rng(0)
    x = torch.tensor(g.standard_normal((400, 12)), dtype=torch.float32)
    labels = dict(pose=x[:, :3]*15, age=(40 + 10*x[:, 3]).clamp(1, 90), gender=(x[:, 4] > 0).long(), expression=(x[:, 5] > 0).long(), ethnicity=(x[:, 6] > 0).long())
    labels = {t: torch.where((torch.rand(400, generator=generator(i)) < .5).view(-1, *[1]*(v.ndim - 1)), torch.nan if v.is_floating_point() else -1, v) for i, (t, v) in enumerate(labels.items())}
    for loss in (HyperFaceLoss(), HyperFaceLoss(mode="learnt"), HyperFaceLoss(schedule=dict(age=(20, 60)))):
        heads = MultiTaskHeads(12, hidden=32)
        optimiser = torch.optim.Adam([*heads.parameters(), *loss.parameters()], lr=.01)
        for step in range(100):
            total, _ = loss(heads(x), labels, step=step)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
        m = task_metrics(heads(x), labels)
        assert m["gender_rate"] > .97 and m["pose_deg"] < 8 and m["age_error"] < 5, m


GROUPS = AttentionConfig(groups=("a", "b", "c"), stages=(2, 4))


@pytest.mark.parametrize("name", ["resnet_tiny", "mobilefacenet", "iresnet18"])
def test_attention_is_the_identity_until_trained_and_adds_nothing_elsewhere(name):
    x = torch.rand(2, 3, 64, 64, generator=generator())*2 - 1
    plain, attended = create_model(name, image_size=64).eval(), create_model(name, image_size=64, attention=GROUPS).eval()
    assert torch.equal(plain(x), attended(x))
    assert {k for k in attended.state_dict() if not k.startswith("attention.")} == set(plain.state_dict())
    features, logits = attended(x, return_groups=True)
    assert [tuple(v.shape) for v in logits] == [(2, 3)]*2 and plain(x, return_groups=True)[1] == []
    inserted = insert_attention(load_strict(create_model(name, image_size=64, seed=5), plain.state_dict(), "test"), GROUPS).eval()
    assert torch.equal(inserted(x), plain(x))


def shaken(model):
    g = generator(3)
    with torch.no_grad():
        for p in model.attention.parameters():
            p.add_(.2*torch.randn(p.shape, generator=g))
    return model


def test_attention_trains_through_the_backbone_and_saves(tmp_path):
    model = shaken(create_model("resnet_tiny", image_size=64, attention=dict(groups=3, stages=[3, 4], kernel=3, stop_gradient="none"))).train()
    x = torch.rand(4, 3, 64, 64, generator=generator())*2 - 1
    features, logits = model(x, return_groups=True)
    (features.square().mean() + group_loss(logits, torch.tensor([0, 2, -1, 1]))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert all(p.grad.any() for p in model.attention.parameters())
    model.eval()
    save_pretrained(model, tmp_path/"m")
    back = from_pretrained(tmp_path/"m")
    assert torch.equal(back(x), model(x)) and back.config == model.config
    assert not torch.allclose(model(x), create_model("resnet_tiny", image_size=64).eval()(x), atol=1e-3)
    export_onnx(model, tmp_path/"m.onnx")  # verifies itself against onnxruntime


@pytest.mark.parametrize("stop, identity_to_groups, groups_to_features", [("none", True, True), ("posterior", False, True), ("features", True, False), ("both", False, False)])
def test_attention_stops_the_gradients_it_says(stop, identity_to_groups, groups_to_features):
    module = DemographicAttention(8, 3, stop_gradient=stop)
    with torch.no_grad():
        module.channel.weight.normal_(generator=generator())
    x = torch.randn(4, 8, 5, 5, generator=generator(), requires_grad=True)
    y, logits = module(x)
    y.square().sum().backward(retain_graph=True)
    assert (module.posterior.weight.grad is not None and bool(module.posterior.weight.grad.any())) == identity_to_groups
    x.grad = None
    group_loss([logits], torch.tensor([0, 1, 2, 0])).backward()
    assert (x.grad is not None and bool(x.grad.any())) == groups_to_features


def test_attention_mixes_the_gates_of_the_groups():
    module = DemographicAttention(8, 2, kernel=0)
    with torch.no_grad():
        module.channel.weight.normal_(generator=generator())
    x = torch.randn(3, 8, 5, 5, generator=generator(1))
    gates = []
    for bias in ([50., -50.], [-50., 50.], [0., 0.]):
        with torch.no_grad():
            module.posterior.weight.zero_()
            module.posterior.bias.copy_(torch.tensor(bias))
        gates.append(module.gates(x)[0])
    assert torch.allclose(gates[2], (gates[0] + gates[1])/2, atol=1e-6) and not torch.allclose(gates[0], gates[1], atol=.1)
    assert all(((g > 0) & (g < 2)).all() for g in gates)
    assert torch.allclose(group_posterior([torch.zeros(2, 4), torch.tensor([[9., 0, 0, 0]]*2)]).sum(1), torch.ones(2))


def test_attention_errors():
    for wrong in (dict(stages=()), dict(stages=(0,)), dict(stages=(3, 3)), dict(groups=1), dict(kernel=4), dict(stop_gradient=True), dict(reduction=0), dict(heads=8)):
        with pytest.raises(ConfigError):
            create_model("resnet_tiny", image_size=64, attention=wrong)
    model = create_model("resnet_tiny", image_size=64, attention=GROUPS)
    with pytest.raises(ConfigError, match="already"):
        insert_attention(model, GROUPS)
    logits = [torch.zeros(3, 3, requires_grad=True)]
    missing = group_loss(logits, torch.full((3,), -1))
    missing.backward()
    assert float(missing) == 0 and not logits[0].grad.any()
    with pytest.raises(DataError, match="3 groups"):
        group_loss(logits, torch.tensor([0, 3, 1]))
    with pytest.raises(ConfigError, match="no attention"):
        group_loss([], torch.tensor([0]))

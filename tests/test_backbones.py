"""Backbones: published names, an independent forward pass, files of strangers, insightface's own door."""
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.data.records import Records
from hyperface.extraction.embed import embed_records, load_embedder
from hyperface.recognition.backbones import (IResNet, area_matrix, as_embedder, create_model, export_onnx, from_pretrained, list_models, load_arcface_torch, model_costs,
                                             save_pretrained, unit_embeddings)

LAYERS = dict(iresnet18=(2, 2, 2, 2), iresnet34=(3, 4, 6, 3), iresnet50=(3, 4, 14, 3), iresnet100=(3, 13, 30, 3), iresnet200=(6, 26, 60, 6))
PUBLISHED = dict(iresnet18=(187, 24.026), iresnet34=(331, 34.139), iresnet50=(475, 43.591), iresnet100=(925, 65.156), iresnet200=(1807, 118.834))


def norm_names(prefix: str, width: int) -> dict:
    return {f"{prefix}.{k}": (width,) for k in ("weight", "bias", "running_mean", "running_var")} | {f"{prefix}.num_batches_tracked": ()}


def iresnet_names(layers) -> dict:
    "name -> shape, from the description of arcface_torch's iresnet."
    out = {"conv1.weight": (64, 3, 3, 3), **norm_names("bn1", 64), "prelu.weight": (64,)}
    inside = 64
    for stage, (n, width) in enumerate(zip(layers, (64, 128, 256, 512)), 1):
        for i in range(n):
            p = f"layer{stage}.{i}"
            out |= {**norm_names(f"{p}.bn1", inside), f"{p}.conv1.weight": (width, inside, 3, 3), **norm_names(f"{p}.bn2", width), f"{p}.prelu.weight": (width,),
                    f"{p}.conv2.weight": (width, width, 3, 3), **norm_names(f"{p}.bn3", width)}
            if i == 0:
                out |= {f"{p}.downsample.0.weight": (width, inside, 1, 1), **norm_names(f"{p}.downsample.1", width)}
            inside = width
    return out | {**norm_names("bn2", 512), "fc.weight": (512, 25088), "fc.bias": (512,), **norm_names("features", 512)}


def mobile_names() -> dict:
    "name -> shape of arcface_torch's mbf."
    out = {}

    def unit(p, shape, active=True):
        out.update({f"{p}.layers.0.weight": shape, **norm_names(f"{p}.layers.1", shape[0])})
        if active:
            out[f"{p}.layers.2.weight"] = (shape[0],)

    def bottleneck(p, inside, outside, wide):
        unit(f"{p}.layers.0", (wide, inside, 1, 1))
        unit(f"{p}.layers.1", (wide, 1, 3, 3))
        unit(f"{p}.layers.2", (outside, wide, 1, 1), active=False)
    unit("layers.0", (128, 3, 3, 3))
    unit("layers.1", (128, 2, 3, 3))
    bottleneck("layers.2", 128, 128, 128)
    for i in range(4):
        bottleneck(f"layers.3.layers.{i}", 128, 128, 128)
    bottleneck("layers.4", 128, 256, 256)
    for i in range(6):
        bottleneck(f"layers.5.layers.{i}", 256, 256, 256)
    bottleneck("layers.6", 256, 256, 512)
    for i in range(2):
        bottleneck(f"layers.7.layers.{i}", 256, 256, 256)
    unit("conv_sep", (512, 256, 1, 1))
    unit("features.layers.0", (512, 1, 7, 7), active=False)
    return out | {"features.layers.2.weight": (512, 512), **norm_names("features.layers.3", 512)}


def shaken(model, seed=0):
    "Random weights and statistics, so that no term of the forward pass is 0 or 1 by accident."
    g = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = .5 + torch.rand(value.shape, generator=g)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(12345)
        elif value.ndim == 1:
            state[name] = (.25 if "prelu" in name else 1. if name.endswith("weight") else 0.) + .2*torch.randn(value.shape, generator=g)
        else:
            state[name] = torch.randn(value.shape, generator=g)*(1.6/value[0].numel())**.5
    model.load_state_dict(state)
    return model.eval()


def norm(s, p, x):
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    return (x - s[f"{p}.running_mean"].view(shape))/torch.sqrt(s[f"{p}.running_var"].view(shape) + 1e-5)*s[f"{p}.weight"].view(shape) + s[f"{p}.bias"].view(shape)


def prelu(slope, x):
    return x.clamp(min=0) + slope.view(1, -1, 1, 1)*x.clamp(max=0)


def plain_iresnet(s, layers, x):
    x = prelu(s["prelu.weight"], norm(s, "bn1", F.conv2d(x, s["conv1.weight"], padding=1)))
    for stage, n in enumerate(layers, 1):
        for i in range(n):
            p, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            y = F.conv2d(norm(s, f"{p}.bn1", x), s[f"{p}.conv1.weight"], padding=1)
            y = prelu(s[f"{p}.prelu.weight"], norm(s, f"{p}.bn2", y))
            y = norm(s, f"{p}.bn3", F.conv2d(y, s[f"{p}.conv2.weight"], stride=stride, padding=1))
            if f"{p}.se.fc1.weight" in s:
                hidden = (y.mean((2, 3)) @ s[f"{p}.se.fc1.weight"].T + s[f"{p}.se.fc1.bias"]).clamp(min=0)
                y = y/(1 + torch.exp(-(hidden @ s[f"{p}.se.fc2.weight"].T + s[f"{p}.se.fc2.bias"])))[:, :, None, None]
            if i == 0:
                x = norm(s, f"{p}.downsample.1", F.conv2d(x, s[f"{p}.downsample.0.weight"], stride=stride))
            x = x + y
    x = norm(s, "bn2", x).reshape(len(x), -1)
    return norm(s, "features", x @ s["fc.weight"].T + s["fc.bias"])


def plain_mobile(s, x):
    def unit(p, x, stride=1, groups=1, padding=0, active=True):
        x = norm(s, f"{p}.layers.1", F.conv2d(x, s[f"{p}.layers.0.weight"], stride=stride, padding=padding, groups=groups))
        return prelu(s[f"{p}.layers.2.weight"], x) if active else x

    def bottleneck(p, x, stride=1):
        y = unit(f"{p}.layers.0", x)
        y = unit(f"{p}.layers.1", y, stride, y.shape[1], 1)
        return unit(f"{p}.layers.2", y, active=False)
    x = unit("layers.0", x, 2, padding=1)
    x = unit("layers.1", x, groups=64, padding=1)
    for down, n in ((2, 4), (4, 6), (6, 2)):
        x = bottleneck(f"layers.{down}", x, 2)
        for i in range(n):
            x = x + bottleneck(f"layers.{down + 1}.layers.{i}", x)
    x = unit("conv_sep", x)
    x = unit("features.layers.0", x, groups=512, active=False).reshape(len(x), -1)
    return norm(s, "features.layers.3", x @ s["features.layers.2.weight"].T)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_iresnet_has_the_published_names_and_shapes(name):
    with torch.device("meta"):
        model = create_model(name)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == iresnet_names(LAYERS[name])
    keys, millions = PUBLISHED[name]
    parameters = sum(p.numel() for p in model.parameters())
    assert len(model.state_dict()) == keys and round(parameters/1e6, 3) == millions
    assert parameters - sum(p.numel() for p in model.parameters() if p.requires_grad) == 512  # the scale of `features` is fixed


def test_squeeze_and_excitation_stands_in_every_block_and_nowhere_else():
    with torch.device("meta"):
        plain, squeezed = create_model("iresnet50").state_dict(), create_model("iresnet50_se").state_dict()
    more = {k: v for k, v in squeezed.items() if k not in plain}
    assert {k: v.shape for k, v in plain.items()} == {k: squeezed[k].shape for k in plain}
    assert set(more) == {k.replace("bn3.weight", f"se.{fc}.{p}") for k in plain if k.endswith("bn3.weight") for fc in ("fc1", "fc2") for p in ("weight", "bias")}


def test_mobilefacenet_has_the_published_names_and_shapes():
    assert {k: tuple(v.shape) for k, v in create_model("mobilefacenet").state_dict().items()} == mobile_names()
    assert len(mobile_names()) == 333


@pytest.mark.parametrize("name", ["iresnet18", "iresnet34", "iresnet18_se"])
def test_iresnet_computes_what_its_description_says(name):
    model = shaken(IResNet(name, LAYERS["iresnet18"], squeeze=True) if name.endswith("_se") else create_model(name))
    x = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*2 - 1
    with torch.no_grad():
        single = model(x.float()).double()
        model = model.double()  # in double precision nothing but the order of operations is left to differ
        ours, plain = model(x), plain_iresnet(model.state_dict(), LAYERS[name.removesuffix("_se")], x)
    assert ours.std() > .1
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    assert (single - plain).norm() < 1e-4*plain.norm()


def test_mobilefacenet_computes_what_its_description_says():
    model = shaken(create_model("mobilefacenet"))
    x = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*2 - 1
    with torch.no_grad():
        single = model(x.float()).double()
        model = model.double()  # in double precision nothing but the order of operations is left to differ
        ours, plain = model(x), plain_mobile(model.state_dict(), x)
    assert ours.std() > .1
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    assert (single - plain).norm() < 1e-4*plain.norm()


@pytest.mark.parametrize("name, size, dim", [("resnet_tiny", 64, 512), ("resnet_tiny", 112, 128), ("resnet_tiny", 50, 64), ("mobilefacenet", 64, 256), ("iresnet18", 96, 512)])
def test_sizes_dimensions_and_gradients(name, size, dim):
    model = create_model(name, image_size=size, embedding_dim=dim, dropout=.2)
    f = model(torch.rand(3, 3, size, size)*2 - 1)
    assert f.shape == (3, dim)
    f.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_a_seed_makes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = (create_model("resnet_tiny", image_size=64, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.fc.weight, b.fc.weight) and not torch.equal(a.fc.weight, c.fc.weight)


def test_list_and_costs():
    assert list_models() == [*LAYERS, "iresnet50_se", "mobilefacenet", "resnet_tiny"]
    costs = model_costs(["resnet_tiny", "iresnet18"], 64)
    assert costs.multiplications["resnet_tiny"] < costs.multiplications["iresnet18"]/10
    by_hand = 64*64*64*27 + sum(((side*2)**2*inside*out + side**2*out*out)*9 + side**2*inside*out + 2*side**2*out*out*9
                                for side, inside, out in ((32, 64, 64), (16, 64, 128), (8, 128, 256), (4, 256, 512))) + 16*512*512
    assert round(costs.multiplications["iresnet18"]*1e6) == by_hand


@pytest.mark.parametrize("bad, says", [(torch.zeros(2, 3, 112, 112), "must be (N, 3, 64, 64)"), (torch.zeros(2, 64, 64, 3), "must be (N, 3, 64, 64)"), (torch.zeros(3, 64, 64), "must be (N, 3, 64, 64)"),
                                       (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "127.5"), (torch.zeros(2, 3, 64, 64, dtype=torch.float64), "float64"),
                                       (torch.full((2, 3, 64, 64), torch.nan), "finite"), (torch.full((2, 3, 64, 64), -torch.inf), "finite"), (torch.full((2, 3, 64, 64), 255.), "127.5"),
                                       (np.zeros((2, 3, 64, 64), np.float32), "torch tensor")])
def test_images_that_are_refused(bad, says):
    with pytest.raises(DataError, match=says.replace("(", r"\(").replace(")", r"\)")):
        create_model("resnet_tiny", image_size=64).eval()(bad)


@pytest.mark.parametrize("wrong", [dict(name="resnet50"), dict(image_size=16), dict(image_size=64.5), dict(image_size="64"), dict(image_size=float("nan")), dict(embedding_dim=0), dict(dropout=1.), dict(dropout=-.1)])
def test_arguments_that_are_refused(wrong):
    with pytest.raises(ConfigError):
        create_model(**{"name": "resnet_tiny", **wrong})


def test_one_image_in_training_is_refused_and_none_in_evaluation_is_fine():
    model = create_model("resnet_tiny", image_size=64)
    with pytest.raises(DataError, match="at least two"):
        model(torch.zeros(1, 3, 64, 64))
    assert model.eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 512)


def test_channels_last_and_autocast():
    model = shaken(create_model("resnet_tiny", image_size=64))
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1
    with torch.no_grad():
        plain = model(x)
        wide = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    torch.testing.assert_close(wide, plain, rtol=1e-4, atol=1e-4)
    assert half.dtype == torch.float32 and F.cosine_similarity(half, plain).min() > .99


def test_embedder_resizes_takes_bytes_and_restores_training_mode():
    model = shaken(create_model("resnet_tiny", image_size=64, embedding_dim=128)).train()
    embedder = as_embedder(model, flip=True)
    assert model.training and embedder.dim == 128 and embedder.size == 64
    pixels = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    v = embedder.embed(pixels.transpose(0, 3, 1, 2))
    assert model.training and np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    again = embed_records(Records.from_arrays(pixels, identity=list("aabbc")), embedder, cache=False)
    assert (again.vectors*v).sum(1).min() > .999  # resized as 8-bit pixels there, as floats here
    assert load_embedder(model).size == 64 and load_embedder(model, backend="torch").name == "resnet_tiny"


def test_unit_embeddings_carry_gradients_and_refuse_no_direction():
    model = shaken(create_model("resnet_tiny", image_size=64))
    x = (torch.rand(3, 3, 64, 64)*2 - 1).requires_grad_()
    e = unit_embeddings(model, x, flip=True)
    e[:, 0].sum().backward()
    assert torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-5) and x.grad.abs().sum() > 0
    assert torch.allclose(e, unit_embeddings(model, x.flip(-1), flip=True), atol=1e-4)
    with pytest.raises(DataError, match="direction"):
        unit_embeddings(lambda images: torch.zeros(len(images), 8), x)


def test_pretrained_round_trip_and_its_faults(tmp_path):
    model = shaken(create_model("resnet_tiny", image_size=64, embedding_dim=96, dropout=.3))
    save_pretrained(model, tmp_path/"a", steps=7)
    assert not list((tmp_path/"a").glob("*.part"))
    back = from_pretrained(tmp_path/"a")
    assert not back.training and back.config == model.config
    assert all(torch.equal(x, y) for x, y in zip(back.state_dict().values(), model.state_dict().values()))
    config = json.loads((tmp_path/"a/config.json").read_text())
    assert config["notes"] == {"steps": 7}

    with pytest.raises(MissingWeights, match="no config.json"):
        from_pretrained(tmp_path)
    for content, says in ((dict(config, format="bert"), "does not describe"), (dict(config, image_size=112), "wrong shapes"), (dict(config, sha256="0"), "not the file"),
                          ({k: v for k, v in config.items() if k != "dropout"}, "incomplete")):
        (tmp_path/"a/config.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=says):
            from_pretrained(tmp_path/"a")
    (tmp_path/"a/config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        from_pretrained(tmp_path/"a")
    (tmp_path/"a/model.safetensors").unlink()
    with pytest.raises(MissingWeights, match="model.safetensors"):
        from_pretrained(tmp_path/"a")
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="fc.weight"):
        save_pretrained(model, tmp_path/"b")
    assert not (tmp_path/"b/model.safetensors").exists()


@pytest.mark.parametrize("name, kwargs", [("iresnet18", {}), ("mobilefacenet", {}), ("mobilefacenet", dict(embedding_dim=128))])
def test_checkpoints_of_arcface_torch(tmp_path, name, kwargs):
    model = shaken(create_model(name, **kwargs))
    x = torch.rand(1, 3, 112, 112)*2 - 1
    for content in (model.state_dict(), dict(state_dict_backbone={f"module.{k}": v.half() if v.is_floating_point() and "running" not in k else v for k, v in model.state_dict().items()})):
        torch.save(content, tmp_path/"model.pt")
        loaded = load_arcface_torch(tmp_path/"model.pt")
        assert loaded.name == name and F.cosine_similarity(loaded(x), model(x)).item() > .999
    assert next(loaded.parameters()).dtype == torch.float32


class Evil:
    def __reduce__(self):
        import os
        return os.system, ("touch /tmp/hyperface_was_here",)


def test_hostile_and_wrong_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path/"evil.pt"
    torch.save(dict(state_dict=Evil()), path, pickle_protocol=2)
    with pytest.raises(DataError, match=r"evil\.pt asks for more than tensors: (posix|os|nt)\.system"):
        load_arcface_torch(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="evil.pt"):
        load_arcface_torch(path)
    torch.save(create_model("resnet_tiny", image_size=64).state_dict(), path)
    with pytest.raises(DataError, match="another depth"):
        load_arcface_torch(path)
    state = create_model("mobilefacenet").state_dict()
    for change, says in ((lambda s: s.pop("conv_sep.layers.1.bias"), "lacks conv_sep.layers.1.bias"), (lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
                         (lambda s: s.update({"features.layers.3.bias": torch.zeros(3)}), "wrong shapes: features.layers.3.bias"),
                         (lambda s: s.update({"features.layers.3.bias": torch.full((512,), torch.nan)}), "not finite in features.layers.3.bias")):
        changed = dict(state)
        change(changed)
        torch.save(changed, path)
        with pytest.raises(DataError, match=says):
            load_arcface_torch(path)
    whole = path.read_bytes()
    for content in (b"", b"no", whole[:len(whole)//2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="evil.pt"):
            load_arcface_torch(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(DataError, match="no state dict"):
        load_arcface_torch(path)
    with pytest.raises(MissingWeights):
        load_arcface_torch(tmp_path/"absent.pt")


@pytest.mark.parametrize("name, size", [("resnet_tiny", 64), ("resnet_tiny", 112), ("mobilefacenet", 112), pytest.param("iresnet18", 112, marks=pytest.mark.slow)])
def test_insightface_takes_the_onnx_file_for_its_own(tmp_path, name, size):
    from insightface.model_zoo import get_model
    model = shaken(create_model(name, image_size=size)).train()
    file = export_onnx(model, tmp_path/"ours.onnx")
    assert model.training and not list(tmp_path.glob(".*"))
    theirs = get_model(str(file), providers=["CPUExecutionProvider"])
    assert type(theirs).__name__ == "ArcFaceONNX" and theirs.taskname == "recognition"
    assert (theirs.input_mean, theirs.input_std, theirs.input_size) == (127.5, 127.5, (112, 112))
    crops = np.random.default_rng(1).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    got = theirs.get_feat([c[..., ::-1] for c in crops])  # they read BGR
    ours = as_embedder(model).embed(crops.transpose(0, 3, 1, 2))
    assert ((got*ours).sum(1)/np.linalg.norm(got, axis=1)).min() > .9999
    again = load_embedder(str(file)).embed(crops.transpose(0, 3, 1, 2))  # and so do we, through onnxruntime
    assert (again*ours).sum(1).min() > .9999


def test_onnx_export_that_cannot_be_right_writes_nothing(tmp_path):
    class Drifting(nn.Module):  # gives something else at each call
        def __init__(self):
            super().__init__()
            self.inner, self.image_size, self.config, self.calls = create_model("resnet_tiny", image_size=112), 112, {}, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x)*torch.linspace(-1, 1, 512)**self.calls
    with pytest.raises(DataError, match="nothing was written"):
        export_onnx(Drifting(), tmp_path/"x.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="onnx"):
        export_onnx(create_model("resnet_tiny", image_size=64), tmp_path/"x.pt")


@pytest.mark.parametrize("n, m", [(112, 64), (112, 112), (96, 50), (3, 1)])
def test_area_matrix_is_opencvs_area_averaging(n, m):
    import cv2
    a = area_matrix(n, m)
    image = np.random.default_rng(0).random((n, n)).astype(np.float32)
    assert np.allclose(a.sum(1), 1, atol=1e-5)
    assert np.allclose(a @ image @ a.T, cv2.resize(image, (m, m), interpolation=cv2.INTER_AREA), atol=1e-4)
    with pytest.raises(ConfigError):
        area_matrix(m, n + 1)

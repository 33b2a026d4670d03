"""Vec2Face's autoencoder: published names, the forward pass restated, masks, and files that are not what they say."""
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.vec2face.networks import GENERATION, TRAINING, FeatureMAE, Masking, draw_masks, fmae_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FeatureMAE(fmae_config("tiny", feature_dim=24)).eval()


def test_published_names_and_shapes():
    path = ROOT.parent / "shared" / "contracts" / "vec2face_state_dict_keys.txt"
    if not path.exists():
        pytest.skip("the list of published names is not on this machine")
    wanted = {}
    for line in path.read_text().splitlines():
        if found := re.fullmatch(r"    (\S+) (\([\d, ]*\))", line):
            wanted[found[1]] = tuple(map(int, re.findall(r"\d+", found[2])))
    with torch.device("meta"):
        mine = {k: tuple(v.shape) for k, v in FeatureMAE().state_dict().items()}
    assert len(wanted) > 100 and {k: mine.get(k) for k in wanted} == wanted
    assert len(mine) == 349 and sum(math.prod(s) for k, s in mine.items() if k != "token_emb.position_ids") == pytest.approx(174.127e6, abs=1e3)


def restated(w, x, drop, hidden, c):
    "The forward pass from the state dict, one sample at a time, with plain operations."
    norm = lambda v, name: F.layer_norm(v, v.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    linear = lambda v, name: v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(v, name, heads):
        q, k, u = linear(norm(v, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        d = q.shape[-1] // heads
        heads_out = [torch.softmax(q[:, i * d:(i + 1) * d] @ k[:, i * d:(i + 1) * d].T / d ** 0.5, -1) @ u[:, i * d:(i + 1) * d] for i in range(heads)]
        v = v + linear(torch.cat(heads_out, -1), f"{name}.attn.proj")
        h = linear(norm(v, f"{name}.norm2"), f"{name}.mlp.fc1")
        return v + linear(0.5 * h * (1 + torch.erf(h / 2 ** 0.5)), f"{name}.mlp.fc2")

    def res(v, name):
        group = lambda y, n: F.group_norm(y, c.groups, w[f"{name}.{n}.weight"], w[f"{name}.{n}.bias"], 1e-6)
        swish = lambda y: y * torch.sigmoid(y)
        y = F.conv2d(swish(group(v, "norm1")), w[f"{name}.conv1.weight"], padding=1)
        y = F.conv2d(swish(group(y, "norm2")), w[f"{name}.conv2.weight"], padding=1)
        short = f"{name}.nin_shortcut.weight"
        return y + (F.conv2d(y, w[short]) if short in w else v)

    images = []
    for i in range(len(x)):
        identity = linear(x[i], "latent_prior_proj_f")
        grid = torch.stack([identity * w["feature_token.weight"][t, 0] + w["feature_token.bias"][t] for t in range(c.tokens)])
        hide = [j for j in range(c.tokens) if hidden[i, j]]
        keep = [0] + [j + 1 for j in range(c.tokens) if not drop[i, j]]
        grid[hide] = identity
        t = torch.cat([identity[None], grid]) + w["token_emb.position_embeddings.weight"]
        t = norm(t, "token_emb.LayerNorm")[keep]
        for k in range(c.depth):
            t = block(t, f"blocks.{k}", c.heads)
        t = linear(norm(t, "norm"), "decoder_embed")
        full = t[0].repeat(c.tokens + 1, 1)
        for place, token in zip(keep, t):
            full[place] = token
        full[[j + 1 for j in hide]] = t[0]
        full = full + w["decoder_pos_embed_learned"][0]
        for k in range(c.decoder_depth):
            full = block(full, f"decoder_blocks.{k}", c.decoder_heads)
        full = norm(full, "decoder_norm")
        v = linear(full[1:], "im_decoder_proj").T.reshape(1, -1, c.grid, c.grid)
        v = F.conv2d(v, w["im_decoder.conv_in.weight"], w["im_decoder.conv_in.bias"], padding=1)
        v = res(res(v, "im_decoder.mid.block_1"), "im_decoder.mid.block_2")
        for level in reversed(range(len(c.multipliers))):
            v = res(res(v, f"im_decoder.up.{level}.block.0"), f"im_decoder.up.{level}.block.1")
            if level:
                v = v.repeat_interleave(2, 2).repeat_interleave(2, 3)
                v = F.conv2d(v, w[f"im_decoder.up.{level}.upsample.conv.weight"], w[f"im_decoder.up.{level}.upsample.conv.bias"], padding=1)
        v = F.group_norm(v, c.groups, w["im_decoder.norm_out.weight"], w["im_decoder.norm_out.bias"], 1e-6)
        images.append(F.conv2d(v * torch.sigmoid(v), w["im_decoder.conv_out.weight"], w["im_decoder.conv_out.bias"], padding=1)[0])
    return torch.stack(images)


@pytest.mark.parametrize("masking", [None, GENERATION, TRAINING])
def test_forward_pass_restated(model, masking):
    x = 5 * torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    drop, hidden = draw_masks(3, masking, generator=torch.Generator().manual_seed(2)) if masking else (torch.zeros(3, 49, dtype=torch.bool),) * 2
    with torch.no_grad():
        ours, tokens = model(x, drop, hidden)
        theirs = restated(model.state_dict(), x, drop, hidden, model.config)
    assert tokens.shape == (3, 50, 64)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_masks_follow_the_truncated_normal():
    from scipy.stats import truncnorm
    g = torch.Generator().manual_seed(0)
    for m in (GENERATION, TRAINING):
        counts = [draw_masks(2, m, generator=g) for _ in range(150)]
        assert all(d.sum(1).tolist() == [math.ceil(49 * m.low)] * 2 and not (d & ~a).any() for d, a in counts)
        wanted = truncnorm((m.low - m.mean) / m.std, (m.high - m.mean) / m.std, m.mean, m.std)
        shares = np.array([float(a.float().mean()) for _, a in counts])
        assert abs(shares.mean() - (wanted.mean() + 0.5 / 49)) < 4 * wanted.std() / 150 ** 0.5 and shares.min() >= m.low


def test_masks_repeat_and_can_be_given(model):
    x = torch.randn(2, 24)
    draw = lambda seed: model(x, generator=torch.Generator().manual_seed(seed))[0]
    with torch.no_grad():
        assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
        drop, hidden = draw_masks(2, GENERATION, generator=torch.Generator().manual_seed(3))
        assert torch.equal(draw(3), model(x, drop, hidden)[0]) and torch.equal(draw(3), model(x, drop.float(), hidden.float())[0])
        assert torch.equal(model(x, masking=None)[0], model(x, masking=None)[0])


@pytest.mark.parametrize("arguments, message", [
    (dict(features=torch.zeros(2, 5)), "features must be"), (dict(features=torch.full((2, 24), float("nan"))), "not finite"), (dict(features=torch.zeros(24)), "features must be"),
    (dict(features=torch.zeros(2, 24), drop_mask=torch.zeros(2, 50)), "drop_mask must be"), (dict(features=torch.zeros(2, 24), all_mask=torch.zeros(1, 49)), "all_mask must be"),
    (dict(features=torch.zeros(2, 24), drop_mask=torch.eye(49)[:2] + torch.tensor([[0.0], [1.0]])), "equally many")])
def test_bad_input(model, arguments, message):
    with pytest.raises(DataError, match=message):
        model(**arguments)


def test_sizes_that_make_no_sense():
    for make in (lambda: fmae_config("huge"), lambda: fmae_config("tiny", width=3), lambda: FeatureMAE(fmae_config("tiny", heads=5)), lambda: Masking(0.5, 0.2), lambda: Masking(std=0.0)):
        with pytest.raises(ConfigError):
            make()


class Trap:
    def __reduce__(self):
        return (open, ("trap-was-sprung", "w"))


@pytest.mark.parametrize("name", ["trap", "empty", "text", "list", "half", "extra", "shape", "nan", "other", "missing"])
def test_checkpoints_that_are_not_what_they_say(model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "vec2face_generator.pth", dict(model.state_dict())
    if name == "trap":
        path.write_bytes(pickle.dumps(dict(model_vec2face=Trap())))
    elif name in ("empty", "text"):
        path.write_bytes(b"" if name == "empty" else b"<html>404</html>")
    elif name == "list":
        torch.save([1, 2], path)
    elif name != "missing":
        changed = dict(half=lambda s: {k: v for k, v in s.items() if "blocks.1" not in k}, extra=lambda s: s | {"blocks.9.norm1.weight": torch.zeros(3)}, shape=lambda s: s | {"norm.weight": torch.zeros(3)},
                       nan=lambda s: s | {"norm.weight": torch.full((64,), float("nan"))}, other=lambda s: {"weight": torch.zeros(2)})[name](state)
        torch.save(dict(model_vec2face=changed), path)
    with pytest.raises(MissingWeights if name == "missing" else DataError, match="vec2face_generator"):
        FeatureMAE.from_vec2face(path, config=model.config)
    assert not (tmp_path / "trap-was-sprung").exists()


def test_saved_and_read_back(model, tmp_path):
    x = torch.randn(2, 24)
    with torch.no_grad():
        image = model(x, masking=None)[0]
        model.save_pretrained(tmp_path / "a", note=1)
        assert torch.equal(FeatureMAE.from_pretrained(tmp_path / "a")(x, masking=None)[0], image)
        model.save_pretrained(tmp_path / "b", half=True)
        assert (FeatureMAE.from_pretrained(tmp_path / "b")(x, masking=None)[0] - image).abs().max() < 0.05 * image.abs().max()
        torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "c.pth")
        assert torch.equal(FeatureMAE.from_vec2face(tmp_path / "c.pth", config=model.config)(x, masking=None)[0], image)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="not the file"):
        FeatureMAE.from_pretrained(tmp_path / "a")

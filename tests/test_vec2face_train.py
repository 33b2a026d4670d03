"""Training Vec2Face: the loss restated, exact resume, two processes as one, growth, and what is refused."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hyperface import cli
from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.extraction.onnx_torch import TorchEmbedder, UnitNetwork
from hyperface.recognition.backbones import create_model
from hyperface.vec2face.losses import LPIPS, LossWeights, OwnPerception, PatchCritic, Vec2FaceLoss, adaptive_weight, critic_loss, ssim
from hyperface.vec2face.networks import TRAINING
from hyperface.vec2face.train import FEATURE_NORM, Vec2FaceFaces, Vec2FaceTrainer, load_vec2face, shipped_vec2face, turned_faces, vec2face_config, vec2face_embedder


def blank(seed=3):
    return TorchEmbedder(UnitNetwork(create_model("resnet_tiny", embedding_dim=64, image_size=32, seed=seed), 32), "untrained", "cpu")


@pytest.fixture(scope="module")
def people():
    return turned_faces(16, 3, seed=62, size=32)


@pytest.fixture(scope="module")
def config():
    return vec2face_config("cpu_smoke", network=dict(feature_dim=64), batch=8, epochs=3., held_out=.1, tick_kimg=.05)


def test_the_terms_restated():
    g = torch.Generator().manual_seed(0)
    made, real = torch.rand(3, 3, 32, 32, generator=g) * 2 - 1, torch.rand(3, 3, 32, 32, generator=g) * 2 - 1
    a, b = torch.randn(3, 17, 6, generator=g), torch.randn(3, 17, 6, generator=g)
    net = blank().network
    v = F.normalize(torch.randn(3, 64, generator=g))
    total, parts = Vec2FaceLoss(LossWeights(), OwnPerception(net.network), net)(made, real, a, b, v)
    wanted = dict(pixels=((made - real) ** 2).mean(), tokens=((a - b) ** 2).mean(), identity=(1 - F.cosine_similarity(net(made), v)).mean())
    for name, value in wanted.items():
        assert parts[name] == pytest.approx(float(value), rel=1e-5)
    assert float(total) == pytest.approx(sum(parts.values()), rel=1e-5) and set(parts) == {"pixels", "perceptual", "ssim", "tokens", "identity"}
    only = Vec2FaceLoss(LossWeights(pixels=0, perceptual=0, ssim=0, tokens=0), recogniser=net)(made, real, None, None, v)
    assert list(only[1]) == ["identity"]


def test_ssim_against_direct_windows():
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(1, 1, 14, 13, generator=g, dtype=torch.float64), torch.rand(1, 1, 14, 13, generator=g, dtype=torch.float64)
    k = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5 ** 2))
    k /= k.sum()
    w, found = np.outer(k, k), []
    for i in range(4):
        for j in range(3):
            p, q = x[0, 0, i:i + 11, j:j + 11].numpy(), y[0, 0, i:i + 11, j:j + 11].numpy()
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            found.append((2 * mp * mq + .01 ** 2) * (2 * c + .03 ** 2) / ((mp ** 2 + mq ** 2 + .01 ** 2) * (vp + vq + .03 ** 2)))
    assert float(ssim(x, y, value_range=1.)[0]) == pytest.approx(np.mean(found), rel=1e-9)


def test_lpips_weighs_channels():
    torch.manual_seed(0)
    model = LPIPS("alex")
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    for w in model.weights:
        w.data.zero_()
    model.weights[0].data[7] = 2.
    conv = model.features[0]
    fx, fy = (F.relu(conv((t - torch.tensor([-.030, -.088, -.188])[:, None, None]) / torch.tensor([.458, .448, .450])[:, None, None])) for t in (x, y))
    fx, fy = fx / fx.norm(dim=1, keepdim=True), fy / fy.norm(dim=1, keepdim=True)
    assert torch.allclose(model(x, y), 2 * ((fx - fy)[:, 7] ** 2).mean((1, 2)), atol=1e-6)
    with torch.no_grad():
        assert LPIPS("vgg")(x, x).abs().max() == 0


def test_critic_and_its_weight():
    critic = PatchCritic((16, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    real, fake = critic(x), critic(x * .5)
    assert float(critic_loss(real, fake)) == pytest.approx(float(((real - 1) ** 2).mean() / 2 + (fake ** 2).mean() / 2), rel=1e-5)
    w = torch.randn(4, requires_grad=True)
    a, b = (w ** 2).sum(), (w * 3).sum()
    assert float(adaptive_weight(a, b, w, .8)) == pytest.approx(.8 * float(2 * w.detach().norm()) / (6 + 1e-4), rel=1e-4)
    assert float(adaptive_weight(a, (w * 0).sum(), w, .8, most=5.)) == pytest.approx(4.)


def test_the_rate_and_the_critic_follow_the_schedule(people, config):
    t = Vec2FaceTrainer(config, people, blank(), device="cpu")
    warm = round(config.warmup * len(t.data.rows) / config.batch)
    t.step(0)
    assert t.g_opt.param_groups[0]["lr"] == pytest.approx(config.lr / max(1, warm)) and not t.critic_plays(0)
    line = t.step(t.total - 1)
    assert {"critic_weight", "d_loss", "g_critic"} <= set(line) and t.critic_plays(t.total - 1)
    assert 0 <= t.g_opt.param_groups[0]["lr"] < config.lr / 2
    off = Vec2FaceTrainer(replace(config, weights=replace(config.weights, critic=0.)), people, blank(), device="cpu")
    assert "d_loss" not in off.step(off.total - 1)


def test_watched_people_are_not_trained_on(people, config):
    data = Vec2FaceTrainer(replace(config, held_out=.2), people, blank(), device="cpu").data
    who = people.codes
    assert len(data.watched) and not set(who[data.watched]) & set(who[data.rows]) and len(set(who[data.rows])) == 13


def test_resume_is_exact_and_a_damaged_checkpoint_falls_back(people, config, tmp_path):
    whole = Vec2FaceTrainer(config, people, blank(), device="cpu").fit()
    Vec2FaceTrainer(config, people, blank(), tmp_path, device="cpu").fit(stop_at=9)
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:500])
    with pytest.warns(UserWarning, match="damaged"):
        again = Vec2FaceTrainer(config, people, blank(), tmp_path, device="cpu").fit()
    for a, b in zip(whole.G.state_dict().values(), again.G.state_dict().values()):
        assert torch.equal(a, b)
    assert [line["step"] for line in again.history] == [line["step"] for line in whole.history]
    assert [line["loss"] for line in again.history] == [line["loss"] for line in whole.history]
    made = Vec2FaceFaces(load_vec2face(tmp_path, "cpu"))
    assert made.feature_norm == FEATURE_NORM and made.image_size == 32 and made.dim == 64
    with pytest.raises(ConfigError, match="another configuration"):
        Vec2FaceTrainer(replace(config, lr=.1), people, blank(), tmp_path, device="cpu").fit()


def test_a_step_that_is_not_finite_is_left_out(people, config):
    t = Vec2FaceTrainer(replace(config, patience=3), people, blank(), device="cpu")
    before = {k: v.clone() for k, v in t.G.state_dict().items()}
    t.data.images = lambda rows: torch.full((len(rows), 3, 32, 32), math.nan)
    t.step(0)
    assert all(torch.equal(v, before[k]) for k, v in t.G.state_dict().items()) and t.guards["G"].skipped == 1
    t.step(1)
    with pytest.raises(DataError, match="not finite 3 times"):
        t.step(2)


def _two(rank, folder, port):
    import os
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    c = vec2face_config("cpu_smoke", network=dict(feature_dim=64), batch=8, epochs=1., held_out=.1, tick_kimg=.05, masking=dict(low=.5, high=.5001, mean=.5, std=.25), critic_from=1.)
    t = Vec2FaceTrainer(c, turned_faces(16, 3, seed=62, size=32), blank(), folder, device="cpu").fit(stop_at=3)
    torch.save(t.G.state_dict(), f"{folder}-{rank}.pt")


def test_two_processes_share_a_batch(people, tmp_path):
    import torch.multiprocessing as mp
    mp.spawn(_two, (str(tmp_path / "run"), 29741), nprocs=2)
    a, b = [torch.load(f"{tmp_path / 'run'}-{r}.pt") for r in (0, 1)]
    assert all(torch.equal(a[k], b[k]) for k in a) and (tmp_path / "run" / "log.jsonl").exists()
    fresh = Vec2FaceTrainer(vec2face_config("cpu_smoke", network=dict(feature_dim=64), batch=8, epochs=1.), people, blank(), device="cpu").G.state_dict()
    assert any(not torch.equal(a[k], fresh[k]) for k in a)


def test_two_processes_see_each_picture_once(people, config):
    from hyperface.sphere.ranks import Ranks
    t = Vec2FaceTrainer(config, people, blank(), device="cpu")
    whole = t.data.batch(1, Ranks())[1]
    parts = [t.data.batch(1, Ranks(r, 2))[1] for r in range(2)]
    assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])


def test_growing_keeps_what_is_known(people, config, tmp_path):
    Vec2FaceTrainer(config, people, blank(), tmp_path, device="cpu").fit(stop_at=2).save(tmp_path)
    large = Vec2FaceTrainer(vec2face_config("cpu_smoke", network=dict(feature_dim=64, multipliers=(1, 1, 2, 2, 2))), people, blank(), init_from=tmp_path, device="cpu")
    small = load_vec2face(tmp_path, "cpu").state_dict()
    mine = large.G.state_dict()
    moved = [k for k in small if k.startswith("im_decoder.up.")]
    assert moved and all(torch.equal(mine[k.replace(f"up.{k.split('.')[2]}", f"up.{int(k.split('.')[2]) + 1}", 1)], small[k]) for k in moved)
    with pytest.raises(ConfigError, match="other sizes|cannot grow"):
        Vec2FaceTrainer(vec2face_config("cpu_smoke", network=dict(feature_dim=64, dim=64)), people, blank(), init_from=tmp_path, device="cpu")


def test_refusals(people, config, tmp_path):
    with pytest.raises(DataError, match="feature_dim"):
        Vec2FaceTrainer(vec2face_config("cpu_smoke"), people, blank(), device="cpu")
    bad = np.zeros((len(people), 64), np.float32)
    bad[5] = np.nan
    with pytest.raises(DataError, match="not finite, of image"):
        Vec2FaceTrainer(config, people, blank(), vectors=bad, device="cpu")
    flipped = TorchEmbedder(UnitNetwork(create_model("resnet_tiny", embedding_dim=64, image_size=32), 32, flip=True), "flip", "cpu")
    with pytest.raises(ConfigError, match="flip=False"):
        Vec2FaceTrainer(config, people, flipped, device="cpu")
    with pytest.raises(DataError, match="no images"):
        Vec2FaceTrainer(config, people.select([]), blank(), device="cpu")
    with pytest.raises(ConfigError, match="perception"):
        Vec2FaceTrainer(config, people, blank(), perception="lpips", device="cpu")
    with pytest.raises(ConfigError, match="Did you mean cpu32"):
        vec2face_config("cpu23")
    with pytest.raises(ConfigError, match="held_out"):
        vec2face_config("cpu64", held_out=1.)
    with pytest.raises(MissingWeights):
        load_vec2face(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        Vec2FaceTrainer(config, people, blank(), file, device="cpu")


def test_the_command(tmp_path, capsys):
    words = f"train-vec2face --config cpu_smoke --identities 12 --per-identity 2 --epochs 1 --batch 8 --device cpu --without critic perceptual -o {tmp_path/'run'}".split()
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists() and "finished': True" in first
    assert cli.main(words) == 0
    assert cli.main(["train-vec2face", "--perceptual", "vgg", "-o", str(tmp_path / "x")]) == 2
    assert cli.main(["train-vec2face", "--data", str(tmp_path / "nothing"), "-o", str(tmp_path / "x")]) == 2


def test_shipped_weights_are_small_and_fit_each_other():
    from pathlib import Path

    import hyperface
    assert "rendered64" in shipped_vec2face()
    for name in shipped_vec2face():
        folder = Path(hyperface.__file__).parent / "assets" / "vec2face" / name
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 8 * 2**20
        assert (folder / "README.md").exists() and (folder / "log.jsonl").exists()
        faces, embedder = Vec2FaceFaces(name), vec2face_embedder(name)
        assert faces.dim == embedder.dim and faces.model.notes["images"] > 0
        people = turned_faces(12, 1, seed=91)
        asked = embedder.embed(people.images())
        kept = asked @ embedder.embed(faces.generate(asked, generator=torch.Generator().manual_seed(0)).numpy()).T
        assert np.diag(kept).mean() > .7 > .4 > np.abs(kept[~np.eye(12, dtype=bool)]).mean()

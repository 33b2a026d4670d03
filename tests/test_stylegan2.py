"""StyleGAN2-ADA: networks against plain layers, published names, gradients, training that repeats and resumes."""
import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.data.records import Records
from hyperface.data.rendered import render_faces
from hyperface.stylegan2.conditions import Categorical, ConditionSchema, Continuous, Identity
from hyperface.stylegan2.losses import ConditionReader, PathLength, condition_loss, d_loss, g_loss, lazy_adam, mix_styles, r1_penalty
from hyperface.stylegan2.networks import ARCHITECTURES, Discriminator, Generator, MappingNetwork, MinibatchStdLayer, SynthesisNetwork
from hyperface.stylegan2.ops import bias_act, conv2d_resample, downsample2d, filter2d, modulated_conv2d, setup_filter, upfirdn2d, upsample2d
from hyperface.stylegan2.sample import StyleGAN2Faces, balanced_conditions, generate, generate_people, generate_records, load_generator, shipped_generators
from hyperface.stylegan2.train import PRESETS, GANData, GANTrainer, build_networks, gan_config, stream_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
from plain_stylegan2 import plain  # noqa: E402


def networks(architecture_g="skip", architecture_d="resnet", c_dim=5, resolution=32, **more):
    torch.manual_seed(1)
    G = Generator(12, c_dim, 16, resolution, 3, dict(num_layers=3), dict(channel_base=512, channel_max=32, architecture=architecture_g, **more))
    D = Discriminator(c_dim, resolution, 3, architecture=architecture_d, channel_base=512, channel_max=32, mapping_kwargs=dict(num_layers=2), **more)
    with torch.no_grad():
        for name, p in [*G.named_parameters(), *D.named_parameters()]:
            if name.endswith(("bias", "noise_strength")):
                p.add_(0.3 * torch.randn(p.shape))
        G.mapping.w_avg.normal_()
    return G, D


def inputs(n=4, c_dim=5):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 12, generator=g), torch.eye(c_dim)[:n] if c_dim else None


def close(a, b, relative=1e-4):
    assert float((a - b).abs().max()) <= relative * float(b.abs().max()), float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("training", [False, True])
def test_same_weights_same_pictures_as_plain_layers(architecture, clamp, training):
    G, D = networks(architecture, architecture, conv_clamp=clamp)
    z, c = inputs()
    G.train(training), D.train(training)
    psi = 1.0 if training else 0.6  # in training the running mean, and with it a truncated style, moves between the two passes
    with torch.no_grad():
        ours = G(z, c, truncation_psi=psi, truncation_cutoff=5, noise_mode="const")
        logits = D(ours, c)
        with plain():
            close(ours, G(z, c, truncation_psi=psi, truncation_cutoff=5, noise_mode="const"))
            close(logits, D(ours, c))
    assert ours.std() > 0.01


def test_fused_and_channels_last_and_unfused_agree():
    G, _ = networks()
    z, c = inputs()
    with torch.no_grad():
        a = G.eval()(z, c, noise_mode="const")
        close(G(z, c, noise_mode="const", fused_modconv=True), a)
        close(G(z, c, noise_mode="const", force_fp32=True), a)
        close(copy.deepcopy(G).to(memory_format=torch.channels_last)(z, c, noise_mode="const"), a)


def contract(kind):
    wanted, on = {}, False
    path = ROOT.parent / "shared" / "contracts" / "stylegan2ada_state_dict_keys.txt"
    if not path.exists():
        pytest.skip("the list of published names is not on this machine")
    for line in path.read_text().splitlines():
        if line.startswith("##"):
            on = line.startswith(f"## {kind} 64px")
        elif on and line.startswith("   "):
            name, shape = line.strip().split(" ", 1)
            wanted[name] = tuple(map(int, re.findall(r"\d+", shape)))
    return wanted


def test_published_names_and_shapes():
    with torch.device("meta"):
        G = Generator(512, 10, 512, 64, 3, dict(num_layers=2), dict(channel_base=16384))
        D = Discriminator(10, 64, 3, channel_base=16384)
    assert {k: tuple(v.shape) for k, v in G.state_dict().items()} == contract("G")
    assert {k: tuple(v.shape) for k, v in D.state_dict().items()} == contract("D")


@pytest.mark.parametrize("resolution, fmaps, layers, g_size, d_size, num_ws", [
    (64, 0.5, 2, 22.24, 23.41, 10), (128, 0.5, 2, 22.95, 23.88, 12), (256, 0.5, 8, 24.77, 24.00, 14), (256, 0.5, 2, 23.19, 24.00, 14), (512, 1, 8, 30.28, 28.98, 16), (1024, 1, 8, 30.37, 29.01, 18)])
def test_published_sizes(resolution, fmaps, layers, g_size, d_size, num_ws):
    with torch.device("meta"):
        G = Generator(512, 0, 512, resolution, 3, dict(num_layers=layers), dict(channel_base=int(32768 * fmaps)))
        D = Discriminator(0, resolution, 3, channel_base=int(32768 * fmaps))
    count = lambda m: round(sum(p.numel() for p in m.parameters()) / 1e6, 2)
    assert (count(G), count(D), G.num_ws) == (g_size, d_size, num_ws)


def test_truncation_and_mapping_against_the_formulas():
    G, _ = networks()
    z, c = inputs()
    m = G.mapping.eval()
    with torch.no_grad():
        unit = lambda x: x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
        x = torch.cat([unit(z), unit(c @ m.embed.weight.T / 5 ** 0.5 + m.embed.bias)], 1)
        for k in range(3):
            layer = getattr(m, f"fc{k}")
            x = F.leaky_relu(x @ layer.weight.T * 0.01 / layer.weight.shape[1] ** 0.5 + layer.bias * 0.01, 0.2) * 2 ** 0.5
        close(m(z, c)[:, 0], x, 1e-5)
        close(m(z, c, truncation_psi=0.3)[:, 4], m.w_avg + 0.3 * (x - m.w_avg), 1e-5)
        m.train()
        before = m.w_avg.clone()
        m(z, c)
        close(m.w_avg, 0.995 * before + 0.005 * x.mean(0), 1e-5)
        before = m.w_avg.clone()
        m(z, c, skip_w_avg_update=True)
        assert torch.equal(before, m.w_avg)


@pytest.mark.parametrize("n, group", [(8, 4), (6, 4), (5, 4), (4, None), (1, 4)])
def test_minibatch_spread(n, group):
    x = torch.randn(n, 6, 4, 4)
    out = MinibatchStdLayer(group, 2)(x)
    size = next(k for k in range(min(group or n, n), 0, -1) if n % k == 0)
    y = x.numpy().reshape(size, n // size, 2, 3, 4, 4)
    spread = np.sqrt(y.var(0) + 1e-8).mean((2, 3, 4))  # (n / size, 2)
    for i in range(n):
        np.testing.assert_allclose(out[i, 6:, 0, 0], spread[i % (n // size)], rtol=1e-4)
    assert torch.equal(out[:, :6], x)


def test_discriminator_is_a_projection():
    _, D = networks()
    x, (_, c) = torch.randn(4, 3, 32, 32), inputs()
    with torch.no_grad():
        direction = D.mapping(None, c)
        D.b4.out, kept = torch.nn.Identity(), D.b4.out
        features = []
        hook = kept.register_forward_hook(lambda m, i, o: features.append(o))
        D.b4.out = kept
        logits = D(x, c)
        hook.remove()
        close(logits[:, 0], (features[0] * direction).sum(1) / direction.shape[1] ** 0.5, 1e-5)


def test_resampling_matches_scipy():
    from scipy.signal import upfirdn
    g = np.random.default_rng(0)
    x, f = g.normal(size=(1, 1, 1, 13)), g.normal(size=5)
    for up, down in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (3, 2)):
        wanted = upfirdn(f, x[0, 0, 0], up, down)
        tail = up - 1  # scipy leaves out the zeros after the last sample
        ours = upfirdn2d(torch.tensor(x), torch.tensor(f)[None], up=(up, 1), down=(down, 1), padding=[4, 4 - tail, 0, 0], gain=1)[0, 0, 0]
        np.testing.assert_allclose(ours[: len(wanted)], wanted[: len(ours)], atol=1e-12)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (1, 5)])
def test_filters_keep_sizes_and_means(size):
    x, f = torch.ones(1, 2, *size, dtype=torch.float64), setup_filter([1, 3, 3, 1]).double()
    assert upsample2d(x, f).shape[2:] == (2 * size[0], 2 * size[1]) and filter2d(x, f).shape == x.shape
    if size == (8, 8):
        assert downsample2d(x, f).shape[2:] == (4, 4)
        for y in (upsample2d(x, f), downsample2d(x, f), filter2d(x, f)):
            close(y[..., 2:-2, 2:-2] if y.shape[-1] > 4 else y[..., 1:-1, 1:-1], torch.ones(1), 1e-12)


def numeric(fn, x, h):
    out = torch.zeros_like(x)
    flat, grad = x.view(-1), out.view(-1)
    for i in range(0, flat.numel(), max(1, flat.numel() // 25)):
        kept = float(flat[i])
        flat[i] = kept + h
        up = float(fn())
        flat[i] = kept - h
        down = float(fn())
        flat[i] = kept
        grad[i] = (up - down) / 2 / h
    return out


def test_gradients_of_both_regularisers_by_finite_differences():
    G, D = [m.double() for m in networks(c_dim=0, resolution=8)]
    x, ws = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, G.num_ws, 16, dtype=torch.float64)

    def r1():
        images = x.clone().requires_grad_()
        return r1_penalty(D(images).double(), images, 2.0)
    weight = D.b8.conv0.weight
    found, = torch.autograd.grad(r1(), weight)
    wanted = numeric(lambda: r1().detach(), weight.data, 1e-5)
    seen = wanted != 0
    assert (found[seen] - wanted[seen]).abs().max() < 1e-5 * wanted.abs().max()

    def pl():
        styles = ws.clone().requires_grad_()
        return PathLength()(G.synthesis(styles, noise_mode="none"), styles, torch.Generator().manual_seed(0))[0]
    weight = G.synthesis.b8.conv0.weight
    found, = torch.autograd.grad(pl(), weight)
    wanted = numeric(lambda: pl().detach(), weight.data, 1e-5)
    seen = wanted != 0
    assert (found[seen] - wanted[seen]).abs().max() < 1e-5 * wanted.abs().max()


def test_losses_are_the_equations():
    real, fake = torch.randn(50, 1, dtype=torch.float64) * 3, torch.randn(40, 1, dtype=torch.float64) * 3
    p, q = 1 / (1 + np.exp(-real.numpy())), 1 / (1 + np.exp(-fake.numpy()))
    assert float(d_loss(real, fake)) == pytest.approx(-np.log(p).mean() - np.log(1 - q).mean(), rel=1e-12)
    assert float(g_loss(fake)) == pytest.approx(-np.log(q).mean(), rel=1e-12)
    assert torch.isfinite(d_loss(torch.tensor([[1e4]]), torch.tensor([[-1e4]])))


def test_condition_loss_against_numpy():
    schema = ConditionSchema([Categorical("gender", ("female", "male")), Continuous("age", 0, 100, knots=3), Continuous("yaw", -90, 90), Identity(dim=4)])
    g = np.random.default_rng(0)
    e = g.normal(size=(2, 4))
    e = (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)
    c = schema.encode(dict(gender=["male", None], age=[25.0, 75.0], yaw=[45.0, None]), identity=e)
    y = torch.tensor(g.normal(size=(2, schema.c_dim)), dtype=torch.float32)
    ce = lambda logits, t: -(np.log(np.exp(logits) / np.exp(logits).sum()) * t).sum()
    n = y.numpy()
    cosine = [1 - n[i, 7:] @ e[i] / np.linalg.norm(n[i, 7:]) for i in range(2)]
    first = (ce(n[0, :2], [0, 1]) + ce(n[0, 2:5], [0.5, 0.5, 0]) + (n[0, 6] - 0.5) ** 2 + cosine[0]) / 4
    second = (ce(n[1, 2:5], [0, 0.5, 0.5]) + cosine[1]) / 2
    np.testing.assert_allclose(condition_loss(schema, y, c), [first, second], rtol=1e-4)


# training

@pytest.fixture(scope="module")
def people():
    return render_faces(30, 4, size=16, nuisance=0.2, seed=3)


TINY = dict(kimg=0.32, tick_kimg=0.08, g_interval=4)


def tiny(**changes):
    return gan_config("cpu16", **{"conditions": ("gender", "age"), **TINY, **changes})


def states(trainer):
    return [v for m in (trainer.G, trainer.D, trainer.ema.module) for v in m.state_dict().values()]


@pytest.mark.parametrize("changes", [dict(), dict(aug="fixed", p=0.5, augpipe="bgcfnc"), dict(aug="ada", p=0.2, ada_kimg=1.0), dict(conditions=(), reader_weight=0.0, hidden=0.0), dict(d_architecture="orig", g_architecture="resnet", style_mixing=0.0)])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, people, changes):
    config = tiny(**changes)
    a = GANTrainer(config, people, tmp_path / "a", device="cpu").fit()
    GANTrainer(config, people, tmp_path / "b", device="cpu").fit(stop_at=17)
    b = GANTrainer(config, people, tmp_path / "b", device="cpu").fit()
    assert all(torch.equal(x, y) for x, y in zip(states(a), states(b))) and a.ada.p == b.ada.p
    assert (tmp_path / "b" / "generator" / "model.safetensors").exists() and len(list((tmp_path / "b" / "grids").glob("*.png"))) >= 4
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in lines][-1] == pytest.approx(0.32) and all({"r_t", "p", "images_per_s", "g_loss", "d_loss"} <= set(line) for line in lines)


def test_a_process_killed_at_any_moment(tmp_path, people):
    people.save(tmp_path / "faces")
    command = [sys.executable, "-m", "hyperface.cli", "train-stylegan2", "--data", str(tmp_path / "faces"), "--config", "cpu16", "--conditions", "gender", "--kimg", "0.48", "--tick-kimg", "0.08", "--device", "cpu", "-o"]
    env = dict(os.environ, HYPERFACE_PROGRESS="0", OMP_NUM_THREADS="1")
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=env, capture_output=True, timeout=300)
    victim = subprocess.Popen([*command, str(tmp_path / "killed")], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*.pt")) and time.time() < deadline and victim.poll() is None:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=env, capture_output=True, timeout=300)
    whole, killed = [Generator.from_pretrained(tmp_path / k / "generator").state_dict() for k in ("whole", "killed")]
    assert all(torch.equal(whole[k], killed[k]) for k in whole)


def _two(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HYPERFACE_PROGRESS="0")
    torch.set_num_threads(1)
    trainer = GANTrainer(tiny(p=0.3), render_faces(30, 4, size=16, nuisance=0.2, seed=3), folder, device="cpu").fit()
    torch.save([v for v in states(trainer)] + [torch.tensor(trainer.ada.p), torch.tensor(trainer.pl.mean)], f"{folder}-{rank}.pt")


def test_two_processes_stay_together(tmp_path, people):
    import torch.multiprocessing as mp
    mp.spawn(_two, (str(tmp_path / "run"), 29731), nprocs=2)
    a, b = [torch.load(f"{tmp_path / 'run'}-{r}.pt") for r in (0, 1)]
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b))
    assert (tmp_path / "run" / "result.json").exists()


def test_ada_raises_p_and_the_printed_rule_lowers_it(people):
    few = people.select(np.arange(20))
    with pytest.warns(UserWarning, match="20 images only"):
        good = GANTrainer(tiny(conditions=(), reader_weight=0.0, hidden=0.0, ada_kimg=1.0, kimg=0.4, lr=0.005), few, device="cpu").fit()
        bad = GANTrainer(tiny(conditions=(), reader_weight=0.0, hidden=0.0, ada_kimg=1.0, kimg=0.4, lr=0.005, p=0.3, ada_rule="printed"), few, device="cpu").fit()
    assert np.mean([line["r_t"] for line in good.history]) > 0.6 and good.ada.p > 0.05
    assert bad.ada.p < 0.3


def test_one_image(tmp_path, people):
    with pytest.warns(UserWarning, match="1 images only"):
        run = GANTrainer(tiny(), people.select([3]), tmp_path / "run", device="cpu").fit()
    assert run.done == run.total


def test_stream_covers_every_image_once_a_pass():
    seen = np.concatenate([stream_rows(s, 7, 4, 0) for s in range(7)])
    assert all(sorted(seen[7 * k:7 * k + 7]) == list(range(7)) for k in range(4))
    assert sorted(np.concatenate([stream_rows(3, 7, 4, 0, r, 2) for r in (0, 1)])) == sorted(stream_rows(3, 7, 4, 0))


def test_identity_vectors_as_conditions(tmp_path, people):
    schema = ConditionSchema([Identity(dim=8)])
    vectors = F.normalize(torch.randn(int(people.codes.max()) + 1, 8, generator=torch.Generator().manual_seed(0)))[people.codes]
    run = GANTrainer(gan_config("cpu16", conditions=("identity",), **TINY), people, tmp_path / "run", schema, vectors, device="cpu")
    run.fit()
    faces = StyleGAN2Faces(load_generator(tmp_path / "run", "cpu"))
    images = faces.generate(vectors[:3], n_per_identity=2, generator=torch.Generator().manual_seed(1))
    assert images.shape == (6, 3, 16, 16) and not torch.equal(images[0], images[1])


def test_mirrored_images_turn_their_yaw(people):
    data = GANData(people, tiny(conditions=("yaw", "gender")))
    block = data.schema.blocks["yaw"]
    assert torch.allclose(data.mirrored[:, block][:, 1], -data.labels[:, block][:, 1], atol=1e-6)
    assert torch.equal(data.mirrored[:, data.schema.blocks["gender"]], data.labels[:, data.schema.blocks["gender"]])


def test_start_from_other_weights(tmp_path, people):
    first = GANTrainer(tiny(), people, tmp_path / "a", device="cpu").fit()
    second = GANTrainer(tiny(), people, device="cpu", init_from=tmp_path / "a")
    assert all(torch.equal(x, y) for x, y in zip(first.ema.module.state_dict().values(), second.G.state_dict().values()))
    with pytest.raises(DataError, match="not a checkpoint"):
        GANTrainer(tiny(channel_max=16), people, device="cpu", init_from=tmp_path / "a")
    with pytest.raises(MissingWeights):
        GANTrainer(tiny(), people, device="cpu", init_from=tmp_path / "nowhere")


def test_a_gradient_that_is_not_finite_is_left_out(people):
    trainer = GANTrainer(tiny(gamma=0.0), people, device="cpu")
    before = [p.clone() for p in trainer.D.parameters()]
    hook = next(trainer.D.parameters()).register_hook(lambda g: g * float("nan"))
    trainer.step(1)
    hook.remove()
    assert trainer.skipped == trainer.guards["D"].bad == 1 and all(torch.equal(a, b) for a, b in zip(before, trainer.D.parameters()))
    trainer.step(2)
    assert trainer.skipped == 1 and trainer.guards["D"].bad == 0


def test_a_network_that_never_moves_stops_the_run(people):
    "The others' good steps must not hide it."
    trainer = GANTrainer(tiny(gamma=0.0, patience=4), people, device="cpu")
    next(trainer.D.parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(DataError, match="not finite 4 times in a row"):
        trainer.fit()
    assert trainer.guards["G"].bad == 0


@pytest.mark.parametrize("error", [MemoryError("x"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_running_out_of_memory_names_the_knobs(people, error, monkeypatch):
    trainer = GANTrainer(tiny(), people, device="cpu")
    def fail(step): raise error
    trainer.step = fail
    with pytest.raises(ConfigError, match="Lower batch"):
        trainer.fit()


@pytest.mark.parametrize("changes, message", [
    (dict(resolution=48), "power of two"), (dict(batch=0), "batch must be above 0"), (dict(hidden=1.5), "hidden must lie"), (dict(augpipe="bgz"), "unknown augmentation pipe"), (dict(gamma=-1.0), "at least 0"),
    (dict(lr=float("nan")), "number"), (dict(conditions=(), reader_weight=1.0), "needs conditions"), (dict(aug="more"), "one of ada"), (dict(channels=3), "no field")])
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        gan_config("cpu16", **changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset):
    with torch.device("meta"):
        G, D = build_networks(gan_config(preset), 3)
    assert sum(p.numel() for p in G.parameters()) > 1000


def test_labels_of_the_wrong_length(people):
    schema = ConditionSchema([Continuous("age", 0, 100)])
    for labels in (np.zeros((len(people), 3)), np.zeros((5, 2)), np.full((len(people), 2), np.nan)):
        with pytest.raises(DataError, match="labels"):
            GANData(people, tiny(conditions=("age",)), schema, labels)
    with pytest.raises((DataError, ConfigError), match="height"):
        GANData(people, tiny(conditions=("height",)))


def test_a_folder_that_cannot_be_written(people, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        GANTrainer(tiny(), people, tmp_path / "file" / "run", device="cpu")


# sampling and weights

def test_save_and_load_refuse_what_does_not_fit(tmp_path):
    G, D = networks()
    G.save_pretrained(tmp_path / "g")
    D.save_pretrained(tmp_path / "d", half=True)
    again = Discriminator.from_pretrained(tmp_path / "d")
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(D.state_dict().values(), again.state_dict().values()))
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    for change, message in ((dict(arguments={**config["arguments"], "c_dim": 7}), "wrong shapes"), (dict(arguments={**config["arguments"], "depth": 7}), "does not take"), (dict(format="x"), "does not describe")):
        (tmp_path / "g" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=message):
            Generator.from_pretrained(tmp_path / "g")
    (tmp_path / "g" / "config.json").write_text(json.dumps(config))
    (tmp_path / "g" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not the file"):
        Generator.from_pretrained(tmp_path / "g")
    with torch.no_grad():
        next(G.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        G.save_pretrained(tmp_path / "h")
    assert not (tmp_path / "h" / "model.safetensors").exists()


def test_people_keep_their_conditions_and_do_not_depend_on_one_another():
    import pandas as pd
    torch.manual_seed(0)
    schema = ConditionSchema([Categorical("gender", ("female", "male")), Continuous("age", 0, 100, knots=4)])
    model = Generator(8, schema.c_dim, 16, 16, 3, dict(num_layers=2), dict(channel_base=256, channel_max=16)).eval(), schema
    asked = pd.DataFrame(dict(gender=["male", "female", "male"], age=[2., 50., 99.]))
    made = generate_people(model, asked, per_identity=4, seed=3, years=5)
    assert made.table.gender.tolist() == ["male"]*4 + ["female"]*4 + ["male"]*4 and made.codes.tolist() == [0]*4 + [1]*4 + [2]*4
    assert made.table.age.between(0, 100).all() and made.table.age.nunique() > 6
    alone = generate_people(model, asked[:1], per_identity=4, seed=3, years=5, batch=3)
    assert np.abs(alone.images() - made.images()[:4]).max() <= 2/255 + 1e-6 and alone.table.age.tolist() == made.table.age.tolist()[:4]
    for bad in (dict(per_identity=0), dict(years=-1), dict(shift=float("nan"))):
        with pytest.raises(ConfigError): generate_people(model, asked, **bad)
    with pytest.raises(DataError, match="No people"): generate_people(model, asked[:0])
    with pytest.raises(ConfigError, match="no condition schema"): generate_people((model[0], None), asked)


def test_generate_by_condition():
    torch.manual_seed(0)
    schema = ConditionSchema([Categorical("gender", ("female", "male")), Continuous("age", 0, 100, knots=4)])
    model = Generator(8, schema.c_dim, 16, 16, 3, dict(num_layers=2), dict(channel_base=256, channel_max=16)).eval(), schema
    a = generate(model, 5, seed=1, gender="male")
    assert torch.allclose(a[:2], generate(model, 2, seed=1, gender="male"), atol=1e-5) and not torch.allclose(a, generate(model, 5, seed=1, gender="female"))
    records = generate_records(model, balanced_conditions(schema, 8), seed=2)
    assert isinstance(records, Records) and records.table.gender.tolist() == ["female", "male"] * 4 and records.table.age.between(18, 75).all()
    assert len(generate_records(model, dict(age=30), 3)) == 3
    for bad in (dict(age=-1), dict(gender="x"), dict(hat=1), dict(labels=np.zeros((2, 3)))):
        with pytest.raises((DataError, ConfigError)):
            generate(model, 2, **bad)
    with pytest.raises(ConfigError):
        generate(model, -1)


def test_command_line(tmp_path, people, capsys):
    from hyperface.cli import main
    people.save(tmp_path / "faces")
    assert main(["train-stylegan2", "--data", str(tmp_path / "faces"), "--config", "cpu16", "--conditions", "gender,age", "--kimg", "0.16", "--tick-kimg", "0.08", "--device", "cpu", "-o", str(tmp_path / "run")]) == 0
    assert main(["sample", "--model", str(tmp_path / "run"), "--age", "30", "--gender", "f", "--n", "9", "-o", str(tmp_path / "grid.png")]) == 0
    assert main(["sample", "--model", str(tmp_path / "run"), "--balanced", "--n", "8", "-o", str(tmp_path / "made")]) == 0
    assert Records.load(tmp_path / "made").table.gender.value_counts().tolist() == [4, 4]
    model, picture = ["sample", "--model", str(tmp_path / "run")], ["-o", str(tmp_path / "x.png")]
    for wrong, says in (([*model, "--age", "300", *picture], "out of range"), ([*model, "--set", "hat", *picture], "NAME=VALUE"), ([*model, "--set", "hat=1", *picture], "no attribute 'hat'"),
                        (["train-stylegan2", "--data", str(tmp_path / "none"), "-o", str(tmp_path / "run2")], "no such data set")):
        capsys.readouterr()
        assert main(wrong) == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "run2").exists()
    assert main(["train-stylegan2", "--data", str(tmp_path / "faces"), "--config", "cpu16", "--conditions", "identity", "--kimg", "0.08", "--device", "cpu", "-o", str(tmp_path / "id")]) == 0
    assert [a.name for a in load_generator(tmp_path / "id", "cpu")[1].attributes] == ["identity"]


def test_from_scratch_is_a_profile_of_its_own(tmp_path, monkeypatch):
    from hyperface import cli
    from hyperface.config import load_profile
    monkeypatch.setenv("HYPERFACE_RUNS", str(tmp_path))
    anew, usual = load_profile(cli._from_scratch("smoke")), load_profile("smoke")
    assert anew == replace(usual, name="smoke-from-scratch", from_scratch=True) and not usual.from_scratch


def test_shipped_weights_are_small_and_say_what_they_are():
    assert "rendered64" in shipped_generators()
    for name in shipped_generators():
        folder = ROOT / "hyperface" / "assets" / name
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 8 * 2**20
        G, schema = load_generator(name, "cpu")
        assert schema is not None and G.notes["images"] > 0 and (folder / "log.jsonl").exists() and (folder / "README.md").exists()


def test_compiles_to_one_graph():
    "torch.compile can capture the networks without a break (no compiler needed: the graph is run as it is)."
    G, D = networks()
    z, c = inputs()
    with torch.no_grad():
        x = G.eval()(z, c, noise_mode="const")
        close(torch.compile(G, backend="eager", fullgraph=True)(z, c, noise_mode="const"), x, 1e-5)
        close(torch.compile(D, backend="eager", fullgraph=True)(x, c), D(x, c), 1e-5)

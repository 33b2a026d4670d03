"""On a GPU: the same numbers as on the processor, in float32; training in bfloat16 and float16; runs that go on; and what a run on several GPUs would use.

Not part of `make test`: run with `pytest -m gpu tests/test_gpu.py` on a machine with a CUDA device. On another machine every test here is skipped.
"""
import copy
import math
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperface.core import best_device
from hyperface.recognition.train import NO_AUGMENT, RecognitionTrainer, Recogniser, join_norms, load_run, resolve_precision

sys.path.insert(0, str(Path(__file__).parent))
from test_attrop import RED, YAW, colour, faces, starts  # noqa: E402
from test_stylegan2 import inputs, networks, tiny  # noqa: E402
from test_train import TINY, patches  # noqa: E402
from test_vec2face_train import blank  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ("cpu", "cuda")


@pytest.fixture(autouse=True)
def exact():
    "Float32 means float32: no TF32 in products and convolutions."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def near(a, b, relative):
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    assert bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= relative * float(b.abs().max()), float((a - b).abs().max() / b.abs().max())


def losses(result):
    return np.array([line["loss"] for line in result.history])


# --- recogniser -------------------------------------------------------------------------------------------------------

GROUPS = dict(ethnicity=np.repeat(["asian", "black", "white", "indian"] * 2, 12), age=np.repeat(np.arange(20., 60., 5.), 12), yaw=np.tile(np.linspace(-30, 30, 12), 8), pitch=np.zeros(96), roll=np.zeros(96))


@pytest.mark.parametrize("changes", [dict(head=h) for h in ("arcface", "cosface", "sphereface", "softmax", "adaface")] + [dict(sample_rate=.6), dict(ema=200.), dict(attention="demographic"), dict(tasks=("age", "pose"), weighting="learnt", task_ramps=(0., 1.))], ids=str)
def test_the_first_steps_are_those_of_the_processor(changes):
    config = replace(TINY, precision="float32", lr=.01, **changes)
    a, b = (RecognitionTrainer(config, patches(**GROUPS), device=d).fit(stop_at=4) for d in DEVICES)
    if "sample_rate" in changes:                               # which centres are drawn depends on the device
        assert np.isfinite(losses(b)).all() and losses(b)[0] == pytest.approx(losses(a)[0], rel=.1)
    else:
        np.testing.assert_allclose(losses(b), losses(a), rtol=2e-3)
    assert next(b.network.parameters()).device.type == "cuda"


def test_bfloat16_is_what_auto_takes_and_it_learns():
    assert resolve_precision("auto", "cuda") == "bf16"
    for precision in ("auto", "fp16"):
        found = RecognitionTrainer(replace(TINY, epochs=12, precision=precision), patches(), device="cuda").fit()
        assert found.precision == ("bf16" if precision == "auto" else "fp16")
        assert np.isfinite(losses(found)).all() and losses(found)[-6:].mean() < .5 * losses(found)[:6].mean()


def test_an_interrupted_run_goes_on_and_is_read_on_the_processor(tmp_path):
    whole = RecognitionTrainer(TINY, patches(), device="cuda").fit()
    RecognitionTrainer(TINY, patches(), folder=tmp_path, device="cuda").fit(stop_at=7)
    again = RecognitionTrainer(TINY, patches(), folder=tmp_path, device="cuda").fit()
    np.testing.assert_allclose(losses(again), losses(whole), rtol=2e-2)      # sums in an order that differs from run to run
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        here, there = load_run(tmp_path).backbone(x), again.network.backbone(x.cuda())
    near(there, here, 1e-4)


def test_a_group_of_one_over_nccl_trains_as_none_at_all():
    import torch.distributed as dist
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.manual_seed(0)
    plain = Recogniser(TINY, 8).cuda().train()
    shared = join_norms(copy.deepcopy(plain))
    x, y = torch.rand(16, 3, 32, 32, device="cuda") * 2 - 1, torch.arange(16, device="cuda") % 8
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(shared)
        (a, _), (b, _) = plain(x, y), wrapped(x, y)
        a.backward(), b.backward()
        near(b, a, 1e-4)
        near(*(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (shared, plain)), 1e-3)      # some are nought but for rounding
        from hyperface.sphere.ranks import Ranks
        group = Ranks.here(best_device("cuda"))
        assert group.size == 1 and group.device.type == "cuda"
        group.size = 2                                         # so that it asks NCCL, which has one member
        assert group.total([1., 2.]) == [1., 2.] and list(group.agreed([3., 4.])) == [3., 4.]
        assert group.total(torch.ones(3, device="cuda")).tolist() == [1., 1., 1.]
    finally:
        dist.destroy_process_group()


def test_pages_take_one_process_for_one_gpu(monkeypatch):
    from hyperface.data.jobs import process_count
    monkeypatch.delenv("HYPERFACE_PROCESSES", raising=False)
    assert 64 % process_count(64) == 0 and process_count(64) <= max(1, torch.cuda.device_count())


def test_a_backbone_as_an_embedder():
    from hyperface.recognition.backbones import as_embedder, create_model
    x = np.random.default_rng(0).uniform(-1, 1, (5, 3, 112, 112)).astype(np.float32)
    for name in ("mobilefacenet", "iresnet18"):
        a, b = (as_embedder(create_model(name, seed=1).eval(), flip=True, device=d).embed(x) for d in DEVICES)
        assert float((a * b).sum(1).min()) > 1 - 1e-5


# --- StyleGAN2 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_pictures_and_verdicts_are_those_of_the_processor(architecture):
    G, D = networks(architecture, architecture)
    z, c = inputs()
    with torch.no_grad():
        here = G.eval()(z, c, noise_mode="const")
        verdict = D.eval()(here, c)
    G.cuda(), D.cuda()
    there = G(z.cuda(), c.cuda(), noise_mode="const", force_fp32=True)
    near(there, here, 1e-4)
    near(D(here.cuda(), c.cuda(), force_fp32=True), verdict, 1e-3)


def test_half_precision_layers_stay_near():
    G, D = networks(num_fp16_res=3, conv_clamp=256.)
    z, c = (t.cuda() for t in inputs())
    G.cuda().eval(), D.cuda().eval()
    with torch.no_grad():
        full = G(z, c, noise_mode="const", force_fp32=True)
        near(G(z, c, noise_mode="const"), full, 3e-2)
        assert bool(torch.isfinite(D(full, c)).all())


def test_the_pipe_of_augmentations_with_the_same_draws():
    from hyperface.stylegan2.augment import augment_pipe
    pipe = augment_pipe("bgcfnc")
    pipe.p.fill_(.8)
    g = torch.Generator().manual_seed(3)
    x = torch.rand(16, 3, 32, 32, generator=g) * 2 - 1
    here = pipe(x, generator=torch.Generator().manual_seed(5))
    there = copy.deepcopy(pipe).cuda()(x.cuda(), generator=torch.Generator().manual_seed(5))
    near(there, here, 1e-3)


@pytest.mark.parametrize("changes", [dict(), dict(p=.4), dict(num_fp16_res=2, conv_clamp=256.), dict(aug="fixed", p=.5, augpipe="bgcfnc")], ids=str)
def test_a_generator_trains_and_goes_on(tmp_path, changes):
    from hyperface.data.rendered import render_faces
    from hyperface.stylegan2.sample import generate, load_generator
    from hyperface.stylegan2.train import GANTrainer
    people, config = render_faces(30, 4, size=16, nuisance=.2, seed=3), tiny(**changes)
    GANTrainer(config, people, tmp_path, device="cuda").fit(stop_at=17)
    done = GANTrainer(config, people, tmp_path, device="cuda").fit()
    assert all(bool(torch.isfinite(v).all()) for m in (done.G, done.D, done.ema.module) for v in m.state_dict().values())
    a, b = (generate(load_generator(tmp_path, d), 6, seed=4, noise_mode="const") for d in DEVICES)
    near(b, a, 1e-2)


def test_shipped_people_look_the_same():
    from hyperface.stylegan2.sample import load_generator, stylegan2_faces
    from hyperface.vec2face.train import Vec2FaceFaces, load_vec2face
    v = torch.nn.functional.normalize(torch.randn(6, 512, generator=torch.Generator().manual_seed(1)))
    streams = lambda: [torch.Generator().manual_seed(k) for k in range(6)]
    a, b = (stylegan2_faces(load_generator("rendered64", d), noise_mode="const").generate(v, n_per_identity=1, generator=streams()) for d in DEVICES)
    near(b, a, 1e-2)
    a, b = (Vec2FaceFaces(load_vec2face("rendered64", d)).generate(v, n_per_identity=1, generator=streams()) for d in DEVICES)
    near(b, a, 1e-3)


# --- Vec2Face ---------------------------------------------------------------------------------------------------------

def test_vec2face_trains_and_goes_on(tmp_path):
    from hyperface.vec2face.train import Vec2FaceTrainer, turned_faces, vec2face_config
    people = turned_faces(16, 3, seed=62, size=32)
    config = vec2face_config("cpu_smoke", network=dict(feature_dim=64), batch=8, epochs=3., held_out=.1, tick_kimg=.05)
    first = {}
    for d in DEVICES:
        t = Vec2FaceTrainer(replace(config, precision="float32"), people, blank(), device=d)
        first[d] = [t.step(k)["loss"] for k in range(3)]
    np.testing.assert_allclose(first["cuda"], first["cpu"], rtol=5e-3)
    Vec2FaceTrainer(config, people, blank(), tmp_path, device="cuda").fit(stop_at=9)
    done = Vec2FaceTrainer(config, people, blank(), tmp_path, device="cuda").fit()
    assert all(math.isfinite(line["loss"]) for line in done.history)


def test_attributes_are_moved_as_on_the_processor():
    from hyperface.vec2face.attrop import Target, attrop
    x = starts(12)
    a, b = (attrop(faces, x.to(d), [Target("yaw", YAW, 30.), Target("red", RED, .1)], colour, max_steps=60) for d in DEVICES)
    assert list(a.reason) == list(b.reason)
    near(b.vectors, a.vectors, 1e-3)


def test_shipped_people_are_steered(tmp_path):
    from hyperface.vec2face.attrop import Target, attrop
    from hyperface.vec2face.train import Vec2FaceFaces, load_vec2face, vec2face_embedder
    v = torch.nn.functional.normalize(torch.randn(3, 512, generator=torch.Generator().manual_seed(1)))
    for network_device in DEVICES:
        found = attrop(Vec2FaceFaces(load_vec2face("rendered64", "cuda")), v, Target("red", RED, .1), vec2face_embedder(device=network_device), max_steps=3)
        assert len(found.vectors) == 3 and np.isfinite(found.errors["red"]).all()


# --- packing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(symmetry="none", init="random"), dict(), dict(method="hyperface"), dict(method="hyperface", batch=256)], ids=str)
def test_packings_are_as_good_as_on_the_processor(options):
    from hyperface.sphere.packing import pack
    a, b = (pack(1200, 64, seed=1, max_steps=60, low_precision=False, device=d, **options) if options.get("method") != "hyperface" else pack(1200, 64, seed=1, max_steps=60, device=d, **options) for d in DEVICES)
    assert b.max_cos == pytest.approx(float(np.max(np.triu(b.points.astype(np.float64) @ b.points.astype(np.float64).T, 1))), abs=1e-6)
    assert math.degrees(math.acos(b.max_cos)) > math.degrees(math.acos(a.max_cos)) - .3


def test_a_gallery_is_kept_to_and_extended():
    from hyperface.sphere.packing import extend, pack
    g = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    found = pack(600, 64, gallery=g, min_anchor_cosine=.7, max_steps=40, device="cuda")
    assert float((found.points * g).sum(1).min()) > .7 - 1e-4
    more = extend(found.points, 60, device="cuda", max_steps=20)
    assert np.array_equal(more.points[:600], found.points) and len(more) == 660


def test_bfloat16_products_lose_little():
    from hyperface.sphere.packing import pack
    a, b = (pack(3000, 128, seed=1, symmetry="none", init="random", max_steps=60, low_precision=low, device="cuda") for low in (False, True))
    assert abs(math.degrees(math.acos(a.max_cos)) - math.degrees(math.acos(b.max_cos))) < .3


def test_a_plan_measures_the_gpu():
    from hyperface.report.plan import measure
    assert 0 < measure(("recogniser", 40, "cpu_quick"), .5, "cuda") < 1 and 0 < measure(("pack", 2000, ""), .5, "cuda") < 10

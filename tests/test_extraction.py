"""Alignment, embedders, photographs and attributes: parity with insightface and onnxruntime, faults, kills, real faces."""
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.data.records import FileSource, Records, standard_table
from hyperface.extraction.align import TEMPLATE, align_faces, apply_similarity, flip_points, invert_similarity, similarity, template, warp
from hyperface.extraction.embed import (Embeddings, LinearEmbedder, OnnxEmbedder, embed_records, fit_linear, load_embedder, normalises_itself, unit_rows)

R = np.random.default_rng(0)


@pytest.fixture()
def runs(tmp_path, monkeypatch) -> Path:
    "A cache of our own."
    monkeypatch.setenv("HYPERFACE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def models() -> Path:
    from hyperface.core import models_dir
    if models_dir() is None: pytest.skip("HYPERFACE_MODELS is not set")
    return models_dir()


def toy_network(path, batch="N", nodes=None, outputs=1, size=112, frozen=False):
    "A random recognition network; `frozen` bakes batch 1 into a Reshape."
    from onnx import TensorProto, helper, numpy_helper, save
    g = np.random.default_rng(3)
    weights = dict(w=g.normal(0, .1, (8, 3, 16, 16)).astype(np.float32), m=g.normal(0, .1, (512, 392)).astype(np.float32), shape=np.array([1, -1]))
    flat = helper.make_node("Reshape", ["r", "shape"], ["f"]) if frozen else helper.make_node("Flatten", ["r"], ["f"])
    nodes = nodes or [helper.make_node("Conv", ["data", "w"], ["h"], strides=[16, 16]), helper.make_node("Relu", ["h"], ["r"]), flat, helper.make_node("Gemm", ["f", "m"], ["out0"], transB=1)]
    graph = helper.make_graph(nodes, "toy", [helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch, 3, size, size])],
                              [helper.make_tensor_value_info(f"out{k}", TensorProto.FLOAT, None) if k else helper.make_tensor_value_info("out0", TensorProto.FLOAT, [batch, 512]) for k in range(outputs)],
                              [numpy_helper.from_array(v, k) for k, v in weights.items()])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), str(path))
    return path


def images(n, size=112): return R.uniform(-1, 1, (n, 3, size, size)).astype(np.float32)


# ---------------------------------------------------------------- alignment

@pytest.mark.parametrize("size,canvas", [(112, 112), (224, 112), (128, 128), (256, 128)])
def test_crops_equal_insightface(size, canvas):
    from insightface.utils import face_align
    import cv2
    photo = cv2.GaussianBlur(R.integers(0, 255, (400, 500, 3)).astype(np.uint8), (0, 0), 2)
    for _ in range(5):
        a = R.uniform(.5, 2.5) * np.exp(1j * R.uniform(-.8, .8))
        z = (TEMPLATE @ [1, 1j] - (56 + 72j)) * a + complex(R.uniform(150, 350), R.uniform(150, 250))
        points = np.stack([z.real, z.imag], 1) + R.normal(0, 2, (5, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = face_align.norm_crop(photo, points.astype(np.float32), size)
        ours = align_faces(photo, points, size, canvas)[0].transpose(1, 2, 0)
        difference = abs(ours.astype(int) - theirs)
        assert difference.mean() < .1 and difference.max() <= 8


def test_similarity_recovers_what_was_done():
    for _ in range(50):
        a, b = R.uniform(.1, 30) * np.exp(1j * R.uniform(-np.pi, np.pi)), complex(*R.uniform(-4000, 4000, 2))
        z = (TEMPLATE @ [1, 1j] - b) / a
        m = similarity(np.stack([z.real, z.imag], 1))
        assert np.allclose(m, [[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]], atol=1e-6 * max(1, abs(b)))
        assert np.allclose(apply_similarity(invert_similarity(m), TEMPLATE), np.stack([z.real, z.imag], 1), atol=1e-6 * (1 + abs(z).max()))


@pytest.mark.parametrize("bad", [np.full((5, 2), np.nan), np.full((5, 2), np.inf), np.zeros((5, 2)), np.full((5, 2), 1e6), TEMPLATE[[1, 0, 2, 4, 3]], TEMPLATE[:4], TEMPLATE * [1, -1],
                                 [["a", "b"]] * 5, None, np.zeros((0, 5, 3))])
def test_no_crop_from_points_that_are_no_face(bad):
    with pytest.raises(DataError): similarity(bad)


def test_mirrored_points_align_the_mirrored_photograph():
    photo = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (150, 1, 3))
    points = TEMPLATE + [30, 10]
    one, two = align_faces(photo, points)[0], align_faces(np.ascontiguousarray(photo[:, ::-1]), flip_points(points, 200))[0]
    assert abs(one[:, 20:90, 20:90].astype(int) - two[:, 20:90, ::-1][:, :, 20:90].astype(int)).max() <= 4


def test_antialias_touches_large_faces_only():
    photo = R.integers(0, 255, (300, 300, 3)).astype(np.uint8)
    m = similarity(TEMPLATE * 1.5 + 20)
    assert (warp(photo, m) == warp(photo, m, antialias=True)).all()
    m = similarity(TEMPLATE * 2.6)
    assert warp(photo, m, antialias=True).std() < warp(photo, m).std() * .8
    away = similarity(TEMPLATE * 3 + 10000)                                     # a crop that lies beside the photograph is black
    assert warp(photo, away, antialias=True).max() == 0


# ---------------------------------------------------------------- Embeddings

def test_embeddings_survive_both_files_with_every_kind_of_column(tmp_path):
    import pandas as pd
    v = unit_rows(R.standard_normal((5, 512)))
    table = pd.DataFrame(dict(id=list("abcde"), identity=[1, 1, 2, 2, 3], gender=pd.Categorical(["female", None, "male", "male", "female"]), age=np.array([1, np.nan, 3, 4, 5], np.float32),
                              note=["ü,\n\"", "", None, "None", "nan"], ok=[True, False, True, True, False]))
    for suffix in ("npz", "parquet"):
        back = Embeddings.load(Embeddings(v, table, dict(embedder="x")).save(tmp_path / f"e.{suffix}"))
        assert (back.vectors == v).all() and back.meta["embedder"] == "x"
        assert back.identities.tolist() == [1, 1, 2, 2, 3]
        assert back.table["note"][[0, 1, 3, 4]].tolist() == ["ü,\n\"", "", "None", "nan"] and back.table["note"].isna().tolist() == [False, False, True, False, False]
        assert back.table["gender"].isna().tolist() == [False, True, False, False, False]
        assert np.allclose(back.table["age"], table["age"], equal_nan=True) and back.table["ok"].tolist() == table["ok"].tolist()
        empty = Embeddings.load(Embeddings(v[:0], table.iloc[:0]).save(tmp_path / f"empty.{suffix}"))
        assert empty.vectors.shape == (0, 512)


def test_embeddings_refuse_poison(tmp_path):
    v = unit_rows(R.standard_normal((3, 8)))
    for bad in (v * 1.01, np.where([[1], [0], [0]], np.nan, v), v[0], v.astype(int), np.zeros((2, 8), np.float32)):
        with pytest.raises(DataError): Embeddings(bad)
    with pytest.raises(DataError, match="length"): Embeddings(v, dict(id=["a", "b"]))
    with pytest.raises(DataError): Embeddings(v).select(np.array([True]))
    for name, content in (("x.npz", b"PK\x03\x04"), ("x.parquet", b"PAR1"), ("x.npy", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")): Embeddings.load(tmp_path / name)
    np.savez(tmp_path / "other.npz", a=v)
    with pytest.raises(DataError, match="vectors"): Embeddings.load(tmp_path / "other.npz")
    np.savez(tmp_path / "hostile.npz", vectors=np.array([{}], dtype=object))    # a pickle in an array
    with pytest.raises(DataError): Embeddings.load(tmp_path / "hostile.npz")
    with pytest.raises(DataError): Embeddings.load(tmp_path / "nowhere.npz")
    with pytest.raises(ConfigError): Embeddings(v).save(tmp_path / "x.csv")


# ---------------------------------------------------------------- embedders

@pytest.mark.parametrize("how", [dict(), dict(batch=1), dict(batch=3), dict(batch=1, frozen=True)])
def test_a_vector_does_not_depend_on_its_batch(tmp_path, how):
    e = OnnxEmbedder(toy_network(tmp_path / "t.onnx", **how), threads=1)
    x = images(7)
    alone = np.concatenate([e.embed(x[i:i + 1]) for i in range(7)])
    for n in (1, 2, 5, 16): assert np.allclose(e.embed(x, batch_size=n), alone, atol=2e-6)
    assert np.allclose(e.embed(x[::-1])[::-1], alone, atol=2e-6)
    assert (e.fixed == 1) == bool(how.get("frozen"))


def test_files_that_are_no_recogniser(tmp_path):
    from onnx import helper
    cut = tmp_path / "cut.onnx"; cut.write_bytes(toy_network(tmp_path / "whole.onnx").read_bytes()[:3000])
    text = tmp_path / "text.onnx"; text.write_text("version https://git-lfs.github.com/spec/v1\n")
    empty = tmp_path / "empty.onnx"; empty.touch()
    maps = toy_network(tmp_path / "maps.onnx", nodes=[helper.make_node("Relu", ["data"], ["out0"])])
    two = toy_network(tmp_path / "two.onnx", nodes=[helper.make_node("Relu", ["data"], ["out0"]), helper.make_node("Neg", ["data"], ["out1"])], outputs=2)
    for path in (cut, text, empty, maps, two):
        with pytest.raises(DataError, match=path.name.replace(".", r"\.")): load_embedder(path)
    with pytest.raises(MissingWeights): load_embedder(str(tmp_path / "not_there.onnx"))
    assert load_embedder(str(tmp_path), threads=1).name == "whole"                # a folder is taken for a pack: its largest usable network
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError): load_embedder(str(tmp_path / "void"))


def test_a_dead_network_is_not_normalised_into_noise(tmp_path):
    from onnx import helper
    nodes = [helper.make_node("Conv", ["data", "w"], ["h"], strides=[16, 16]), helper.make_node("Sub", ["h", "h"], ["z"]), helper.make_node("Flatten", ["z"], ["f"]), helper.make_node("Gemm", ["f", "m"], ["out0"], transB=1)]
    e = OnnxEmbedder(toy_network(tmp_path / "dead.onnx", nodes=nodes), threads=1)
    with pytest.raises(DataError, match="no direction"): e.embed(images(2))


def test_real_networks_are_recognised(models):
    import onnx
    for name, raw in (("w600k_mbf_dequant_fp32.onnx", False), ("genderage_mx.onnx", True), ("w600k_mbf_int8.onnx", False)):
        assert normalises_itself(onnx.load(str(models / name))) == raw, name
    with pytest.raises(DataError, match="det_500m"): load_embedder("det_500m.onnx")
    quantised = load_embedder("w600k_mbf_int8.onnx", threads=1)
    x = images(3); x[2] *= .1
    assert np.allclose(quantised.embed(x)[0], quantised.embed(x[:1])[0], atol=1e-6)


def test_same_as_insightface_recogniser(models):
    from insightface.model_zoo import get_model
    net = get_model(str(models / "w600k_mbf_dequant_fp32.onnx"), providers=["CPUExecutionProvider"])
    crop = R.integers(0, 255, (112, 112, 3)).astype(np.uint8)
    theirs = net.get_feat(np.ascontiguousarray(crop[..., ::-1]))[0]
    ours = load_embedder("w600k_mbf_dequant_fp32.onnx", threads=1).embed(crop.transpose(2, 0, 1)[None])[0]
    assert theirs @ ours / np.linalg.norm(theirs) > .99999


def test_linear_fit_is_what_scipy_solves():
    "The discriminants of the generalised eigenproblem, by an independent solver."
    from scipy.linalg import eigh
    who = np.repeat(np.arange(12), 20)
    x = R.normal(0, 1, (240, 6)) @ R.normal(0, 1, (6, 6)) + R.normal(0, 3, (12, 6))[who]
    mean, matrix = fit_linear(x, who, dim=3, ridge=0.)
    centred = x - x.mean(0); centres = np.stack([centred[who == k].mean(0) for k in range(12)])
    within = (centred - centres[who]).T @ (centred - centres[who]) / (240 - 12)
    _, theirs = eigh(centres.T @ centres / 12, within)
    for k in range(3):
        a, b = matrix[:, k].astype(float), theirs[:, -1 - k]
        assert abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) > 1 - 1e-6
    assert LinearEmbedder(np.zeros(588), np.eye(588, 512)).embed(images(2)).shape == (2, 512)


# ---------------------------------------------------------------- torch copies

def test_torch_copies_of_all_networks(models):
    import onnxruntime, torch
    from hyperface.extraction.onnx_torch import onnx_to_torch
    torch.set_num_threads(1); onnxruntime.set_default_logger_severity(4)
    for path in sorted(models.glob("*.onnx")):
        if path.stem.startswith("det_2"): continue                              # the same operations as det_500m, and slow
        s = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        shape = [d if isinstance(d, int) else 160 if "det" in path.name else 112 for d in s.get_inputs()[0].shape[1:]]
        small = torch.nn.functional.interpolate(torch.tensor(R.standard_normal((1, shape[0], 8, 8)), dtype=torch.float32), shape[1:], mode="bicubic").tanh()
        theirs = np.concatenate([o.ravel() for o in s.run(None, {s.get_inputs()[0].name: small.numpy()})])
        x = small.clone().requires_grad_()
        out = onnx_to_torch(path)(x)
        out = out if isinstance(out, tuple) else (out,)
        ours = torch.cat([o.flatten() for o in out])
        assert float(torch.nn.functional.cosine_similarity(ours.detach(), torch.tensor(theirs), dim=0)) > .9999, path.name
        ours.square().sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0, path.name


def test_gradient_of_the_real_recogniser(arcface):
    import torch
    from hyperface.extraction.onnx_torch import torch_embedder
    torch.set_num_threads(1)
    e = torch_embedder(arcface, flip=True)
    net = e.network.double()
    x = torch.tensor(images(1, 112), dtype=torch.float64, requires_grad=True)
    g = torch.Generator().manual_seed(0)
    direction, target = torch.randn(x.shape, dtype=torch.float64, generator=g), torch.nn.functional.normalize(torch.randn(1, 512, dtype=torch.float64, generator=g))
    (net(x) * target).sum().backward()
    with torch.no_grad(): numeric = ((net(x + 1e-8 * direction) - net(x - 1e-8 * direction)) * target).sum() / 2e-8  # short: PReLU has kinks
    assert float((x.grad * direction).sum()) == pytest.approx(float(numeric), rel=1e-4)


def test_backends_agree(arcface):
    x = images(2)
    for flip in (False, True):
        a, b = load_embedder(arcface, flip=flip, threads=1), load_embedder(arcface, flip=flip, backend="torch")
        assert (a.embed(x) * b.embed(x)).sum(1).min() > .9999 and a.key != b.key


def test_a_torch_network_is_an_embedder_with_a_key_of_its_weights():
    import torch
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Dropout(.5), torch.nn.BatchNorm1d(48), torch.nn.Linear(48, 512))
    e = load_embedder(net.train())
    x = images(3)
    assert np.allclose(e.embed(x), e.embed(x)) and np.allclose(e.embed(x)[1:2], e.embed(x[1:2]), atol=1e-6)
    before = e.key
    with torch.no_grad(): net[4].weight[0, 0] += 1
    assert load_embedder(net).key != before


# ---------------------------------------------------------------- data sets, once

CHILD = """
import os, signal, sys, numpy as np
from hyperface.data.records import Records
from hyperface.extraction.embed import OnnxEmbedder, embed_records
class Counted(OnnxEmbedder):
    seen = 0
    def features(self, x):
        Counted.seen += len(x)
        if Counted.seen > int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
        return super().features(x)
r = Records.from_arrays(np.random.default_rng(0).integers(0, 255, (60, 112, 112, 3)).astype(np.uint8))
e = embed_records(r, Counted(sys.argv[1], threads=1), batch_size=5, chunk=10)
np.save(sys.argv[3], e.vectors); print(Counted.seen)
"""


def test_kill_and_go_on(tmp_path, runs):
    network = toy_network(tmp_path / "t.onnx")
    run = lambda lives, out: subprocess.run([sys.executable, "-c", CHILD, str(network), str(lives), str(tmp_path / out)], capture_output=True, text=True, env={**os.environ, "HYPERFACE_RUNS": str(runs)})
    assert run(33, "a.npy").returncode == -signal.SIGKILL
    second = run(10**6, "b.npy")
    assert second.stdout.strip() == "30", second.stdout + second.stderr           # three files of ten were finished
    assert run(0, "c.npy").stdout.strip() == "0"                                  # nothing left to do
    os.environ["HYPERFACE_RUNS"] = str(tmp_path / "fresh")
    import shutil; shutil.rmtree(runs)
    assert run(10**6, "d.npy").stdout.strip() == "60"
    assert (np.load(tmp_path / "b.npy") == np.load(tmp_path / "c.npy")).all() and np.allclose(np.load(tmp_path / "b.npy"), np.load(tmp_path / "d.npy"), atol=1e-6)
    assert not list(runs.rglob("*.part"))


def test_two_processes_at_once(tmp_path, runs):
    network = toy_network(tmp_path / "t.onnx")
    both = [subprocess.Popen([sys.executable, "-c", CHILD, str(network), "1000000", str(tmp_path / f"{k}.npy")], stdout=subprocess.PIPE, env={**os.environ, "HYPERFACE_RUNS": str(runs)}) for k in "ab"]
    assert [p.wait(120) for p in both] == [0, 0]
    assert np.allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-6)


def test_records_with_holes(tmp_path, runs):
    from hyperface.data.images import encode_image
    network = OnnxEmbedder(toy_network(tmp_path / "t.onnx"), threads=1)
    folder = tmp_path / "faces"; folder.mkdir()
    for k in range(9): (folder / f"{k}.png").write_bytes(encode_image(R.integers(0, 255, (90, 90, 3)).astype(np.uint8)))
    table = standard_table(dict(image=[f"{k}.png" for k in range(9)], identity=np.arange(9)//3))
    records = Records(table, FileSource(folder, table["image"]))
    whole = embed_records(records, network)
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:100]); (folder / "7.png").unlink(); (folder / "8.png").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"4\.png"): embed_records(records, network)
    rest = embed_records(records, network, on_error="skip")
    assert rest.table["image"].tolist() == [f"{k}.png" for k in (0, 1, 2, 3, 5, 6)] and (rest.report.status == "skipped").sum() == 3
    assert (rest.report.reason[rest.report.status == "skipped"].str.len() > 10).all()
    assert np.allclose(rest.vectors, whole.vectors[[0, 1, 2, 3, 5, 6]], atol=1e-6)
    assert len(embed_records(records.select([]), network)) == 0
    for wrong in (dict(on_error="ignore"), dict(batch_size=0), dict(chunk=0)):
        with pytest.raises(ConfigError): embed_records(records, network, **wrong)


def test_lfw_600_pairs(lfw, arcface):
    "The first 30 + 30 pairs of each fold; insightface's flip-summed protocol: 99.83 %."
    from hyperface.metrics.verification import kfold_accuracy
    lines = [l.split("\t") for l in (lfw / "pairs_600.txt").read_text().splitlines()[1:] if l.strip()]
    file = lambda who, k: f"{who}/{who}_{int(k):04d}.jpg"
    named = [(file(p[0], p[1]), file(p[0], p[2]), True) if len(p) == 3 else (file(p[0], p[1]), file(p[2], p[3]), False) for p in lines]
    names = sorted({x for p in named for x in p[:2]})
    assert (len(named), len(names)) == (600, 901)
    table = standard_table(dict(image=names))
    found = embed_records(Records(table, FileSource(lfw / "lfw112", table["image"]), name="lfw"), load_embedder(arcface, flip=True))
    row = {n: k for k, n in enumerate(names)}
    scores = np.array([found.vectors[row[a]] @ found.vectors[row[b]] for a, b, _ in named])
    labels = np.array([s for _, _, s in named])
    fold = kfold_accuracy(scores, labels, protocol="insightface")
    assert 100 * fold.mean == pytest.approx(99.8333, abs=.01)


# ---------------------------------------------------------------- photographs

@pytest.fixture(scope="module")
def group() -> np.ndarray:
    from insightface.data import get_image
    return np.ascontiguousarray(get_image("t1")[..., ::-1])


def test_the_photograph_in_every_disguise(group, models, tmp_path):
    import cv2
    from PIL import Image
    from hyperface.extraction.photos import extract_faces, load_detector
    picture = Image.fromarray(group)
    picture.save(tmp_path / "plain.png")
    for tag, turn in ((3, Image.ROTATE_180), (6, Image.ROTATE_90), (8, Image.ROTATE_270), (2, Image.FLIP_LEFT_RIGHT)):
        exif = Image.Exif(); exif[0x0112] = tag
        picture.transpose(turn).save(tmp_path / f"exif{tag}.jpg", exif=exif, quality=97)
    picture.convert("RGBA").save(tmp_path / "rgba.png"); picture.convert("L").save(tmp_path / "grey.jpg", quality=95)
    cv2.imwrite(str(tmp_path / "sixteen.png"), group[..., ::-1].astype(np.uint16) * 257)
    picture.resize((5376, 3721), Image.BICUBIC).save(tmp_path / "twenty_megapixels.jpg", quality=90)
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "exif3.jpg").read_bytes()[:40000])
    picture.crop((0, 640, 1280, 886)).save(tmp_path / "table_only.png")
    (tmp_path / "zero.jpg").touch()
    found = extract_faces(tmp_path, load_detector("det_500m.onnx"), "w600k_mbf_dequant_fp32.onnx")
    report = found.report.set_index("photo")
    assert report.status["truncated.jpg"] == report.status["zero.jpg"] == "skipped" and "truncated.jpg" in report.reason["truncated.jpg"]
    assert report.status["table_only.png"] == "no face"
    plain = found.select("photo == 'plain.png'").vectors
    cosines = plain @ plain.T
    assert len(plain) == 6 and cosines[~np.eye(6, dtype=bool)].max() < .25
    for name in report.index[report.status == "embedded"]:
        v = found.select(f"photo == '{name}'").vectors
        assert len(v) == 6, name
        own = (v @ plain.T).max(1)
        assert own.min() > (.7 if name == "grey.jpg" else .9), (name, own)
        assert sorted((v @ plain.T).argmax(1)) == list(range(6)), name
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    largest = extract_faces(tmp_path / "plain.png", load_detector("det_500m.onnx"), "w600k_mbf_dequant_fp32.onnx", keep="largest")
    assert len(largest) == 1 and largest.table["size"][0] == pytest.approx(found.select("photo == 'plain.png'").table["size"].max())
    assert Embeddings.load(found.save(tmp_path / "e.parquet")).table["photo"].tolist() == found.table["photo"].tolist()


def test_blurred_mirror_image(group, models):
    import cv2
    from hyperface.extraction.photos import extract_faces
    one = extract_faces(group)
    two = extract_faces(cv2.GaussianBlur(np.ascontiguousarray(group[:, ::-1]), (5, 5), 0))
    assert len(one) == len(two) == 6 and (one.vectors @ two.vectors.T).max(1).min() > .85


def test_no_detector_no_silence(models, tmp_path):
    from hyperface.extraction.photos import load_detector
    (tmp_path / "text.onnx").write_text("no")
    for bad in (tmp_path / "text.onnx", models / "genderage_mx.onnx", models / "fer2013_mini_XCEPTION.onnx", models / "pfld_68.onnx"):
        with pytest.raises(DataError, match=bad.name): load_detector(str(bad))
    for missing in ("det_99g.onnx", "buffalo_none"):
        with pytest.raises(MissingWeights): load_detector(missing)
    with pytest.raises(MissingWeights): load_detector("buffalo_l", root=tmp_path)


def test_detector_bears_odd_pictures(models):
    from hyperface.extraction.photos import load_detector
    d = load_detector("det_500m.onnx", det_size=160)
    for shape in ((2, 2), (1000, 3), (3, 1000), (31, 33), (700, 9)): assert len(d.detect(np.full((*shape, 3), 90, np.uint8))) == 0
    for bad in (np.zeros((20, 20, 3)), np.zeros((20, 20), np.uint8), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(DataError): d.detect(bad)


def test_without_models_the_remedy_is_named(monkeypatch, tmp_path):
    from hyperface.extraction.attributes import MODELS, load_attribute_model
    from hyperface.extraction.photos import extract_faces
    monkeypatch.delenv("HYPERFACE_MODELS", raising=False); monkeypatch.delenv("HYPERFACE_DATA", raising=False); monkeypatch.setenv("HOME", str(tmp_path))
    for kind in MODELS:
        with pytest.raises(MissingWeights, match="HYPERFACE_MODELS"): load_attribute_model(kind)
    with pytest.raises(MissingWeights, match="HYPERFACE_MODELS"): extract_faces(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(MissingWeights, match="linear"): load_embedder("w600k_r50")


# ---------------------------------------------------------------- attributes

def test_attributes_do_not_depend_on_the_batch(models):
    from hyperface.extraction.attributes import MODELS, load_attribute_model
    x = np.clip(np.cumsum(R.normal(0, .1, (5, 3, 112, 112)), 3), -1, 1).astype(np.float32)
    for kind in MODELS:
        m = load_attribute_model(kind, threads=1)
        together, alone = m.predict(x), m.predict(x[3:4])
        numbers = together.select_dtypes("number").columns
        assert np.allclose(together[numbers].iloc[3], alone[numbers].iloc[0], atol=1e-3), kind
        assert len(m.predict(x[:0])) == 0 and list(m.predict(x[:0])) == list(together)
        with pytest.raises(DataError): m.predict(x * np.nan)


def test_gender_on_lfw(lfw, models):
    "insightface's network on 300 labelled LFW images: about 96 % (measured once on all: 95.9)."
    from hyperface.data.images import decode_image
    from hyperface.extraction.attributes import load_attribute_model
    labelled = [(n.strip(), g) for g in ("male", "female") for n in (lfw / f"{g}_names.txt").read_text().split() if n.strip()]
    labelled = [labelled[k] for k in np.random.default_rng(1).permutation(len(labelled))[:300]]
    x = np.stack([decode_image(lfw / "lfw112" / n.rsplit("_", 1)[0] / n).transpose(2, 0, 1) for n, _ in labelled])
    told = load_attribute_model("age_gender").predict(x).gender
    assert np.mean(told.to_numpy() == [g for _, g in labelled]) > .92


def test_the_recogniser_of_a_pack_is_not_its_largest_landmark_network(tmp_path):
    "buffalo_s holds a 143 MB landmark network of 192 pixels beside a 13 MB recogniser of 112."
    from onnx import TensorProto, helper, numpy_helper, save
    pack = tmp_path / "models" / "toy_pack"; pack.mkdir(parents=True)
    toy_network(pack / "w600k_toy.onnx")
    heavy = numpy_helper.from_array(np.zeros((3 * 192 * 192, 40), np.float32), "m")
    graph = helper.make_graph([helper.make_node("Flatten", ["data"], ["f"]), helper.make_node("MatMul", ["f", "m"], ["out"])], "landmarks", [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, 192, 192])],
                              [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 40])], [heavy])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), str(pack / "1k3d68.onnx"))
    assert load_embedder(str(pack), threads=1).name == "w600k_toy"


def test_any_object_with_embed_is_an_embedder(runs):
    class Duck:
        name, dim, key = "duck", 4, "duck-1"
        def embed(self, x): return unit_rows(np.asarray(x).mean((2, 3)) @ np.ones((3, 4)) + np.arange(1, 5) * 9.)
    records = Records.from_arrays(R.integers(0, 255, (6, 40, 40, 3)).astype(np.uint8))
    assert embed_records(records, Duck()).vectors.shape == (6, 4)


def test_a_large_photograph_without_a_face_is_looked_at_twice_cheaply(models):
    import resource
    from hyperface.extraction.photos import load_detector
    d = load_detector("det_500m.onnx")
    photo = np.full((3700, 5400, 3), 90, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(d.detect(photo)) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000   # kB; padding the whole photograph would take 240 MB and more


def test_second_look_gives_places_on_the_photograph(group, models):
    from hyperface.extraction.photos import load_detector
    import cv2
    d = load_detector("det_500m.onnx")
    face = d.detect(group)[[0]]
    left, top, right, bottom = face.boxes[0].round().astype(int)
    close = cv2.resize(group[top - 10:bottom + 10, left - 10:right + 10], None, fx=14, fy=14, interpolation=cv2.INTER_CUBIC)
    found = d.detect(close)
    assert len(found) == 1 and abs(found.points[0] - (face.points[0] - [left - 10, top - 10]) * 14).max() < .06 * max(close.shape)

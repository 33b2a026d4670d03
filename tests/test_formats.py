"""Data set formats: round trips, parity with the libraries that own the formats, laziness, and real LFW."""
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hyperface.core import ConfigError, DataError, data_dir
from hyperface.data import containers, formats, images, pairs
from hyperface.data.records import Records, Skipped, standard_table


def make(n_identities=5, per_identity=3, size=20, seed=0):
    "Random small pictures with every kind of column."
    draw = np.random.default_rng(seed)
    n = n_identities*per_identity
    return Records.from_arrays(draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8), name="made",
                               image=[f"p{i//per_identity}/{i % per_identity:03d}" for i in range(n)], identity=[f"p{i//per_identity}" for i in range(n)],
                               age=draw.integers(1, 90, n), gender=draw.choice(["female", "male"], n), yaw=draw.normal(0, 20, n))


@pytest.fixture
def records():
    return make()


# --- the native form ---------------------------------------------------------------------------------------------

def test_native_round_trip_keeps_every_column_and_pixel(records, tmp_path):
    back = Records.load(records.save(tmp_path/"set"))
    np.testing.assert_array_equal(back.images(), records.images())
    pd.testing.assert_frame_equal(back.table.drop(columns="image"), records.table.drop(columns="image"))
    assert back.name == records.name and repr(back) == repr(records)
    assert formats.detect_format(tmp_path/"set") == "native"


def test_saving_files_copies_their_bytes(records, tmp_path):
    records.save(tmp_path/"a", format="jpg", quality=80)
    once = formats.read_dataset(tmp_path/"a")
    once.save(tmp_path/"b")
    twice = formats.read_dataset(tmp_path/"b")
    for i in range(len(once)):
        assert once.source.encoded(i) == twice.source.encoded(i)


def test_save_refuses_an_occupied_folder_and_leaves_nothing_behind(records, tmp_path, monkeypatch):
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"mine.txt").write_text("keep me")
    with pytest.raises(DataError, match="not empty"):
        records.save(tmp_path/"set")
    import pyarrow.parquet
    monkeypatch.setattr(pyarrow.parquet, "write_table", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space"):
        records.save(tmp_path/"other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"] and (tmp_path/"set"/"mine.txt").exists()


def test_equal_names_of_different_identities_do_not_overwrite_each_other(tmp_path):
    r = Records.from_arrays(np.arange(4, dtype=np.uint8)[:, None, None, None]*np.ones((1, 4, 4, 3), np.uint8)*50, image=["a/../b", "a/b", "a\\b", "c"], identity=[1, 1, 2, 2])
    back = Records.load(r.save(tmp_path/"s"))
    np.testing.assert_array_equal(back.images(), r.images())


# --- containers, round trips ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["rec", "lmdb", "zip"])
def test_container_round_trip(records, tmp_path, form):
    write = dict(rec=lambda: containers.write_rec(records, tmp_path/"train", format="png"), lmdb=lambda: containers.write_lmdb(records, tmp_path/"x", format="png"),
                 zip=lambda: containers.write_zip(records, tmp_path/"x.zip"))[form]
    path = write()
    back = formats.read_dataset(path)
    assert back.format == form
    np.testing.assert_array_equal(back.images(), records.images())
    np.testing.assert_array_equal(back.identities, records.codes)
    assert not back.skipped


def test_rec_is_sorted_by_identity_with_ranges(tmp_path):
    records = make().select(np.random.default_rng(1).permutation(15))
    back = containers.read_rec(containers.write_rec(records, tmp_path/"t", format="png"))
    assert (np.diff(back.identities) >= 0).all()
    np.testing.assert_array_equal(back.images(), records.select(np.argsort(records.codes, kind="stable")).images())
    assert back.table.image.iloc[0] == "p0/" + records.table.image[records.table.identity == "p0"].iloc[0].split("/")[1] + ".png"
    raw = (tmp_path/"t.rec").read_bytes()
    assert struct.unpack_from("<IIIfQQ2f", raw)[-2:] == (16., 21.)              # record 0: images 1..15, identities 16..20


def test_rec_without_its_index_reads_the_same(records, tmp_path):
    path = containers.write_rec(records, tmp_path/"t", format="png")
    first = containers.read_rec(path).images()
    (tmp_path/"t.idx").unlink()
    (tmp_path/"t.lst").unlink()
    np.testing.assert_array_equal(containers.read_rec(path).images(), first)


@pytest.mark.parametrize("seed", range(20))
def test_any_payload_survives_recordio(tmp_path, seed):
    "Payloads that are full of the magic number, at every alignment."
    draw = np.random.default_rng(seed)
    sign = struct.pack("<I", containers.MAGIC)
    payloads = [b"".join(draw.choice([sign, b"\0", b"ab", sign[:2], sign*2], draw.integers(1, 30)).tolist()) or b"x" for _ in range(20)]
    labels = [float(draw.integers(0, 9)) if draw.random() < .5 else [float(draw.integers(0, 9)), 2.5, float(k)] for k in range(20)]
    (tmp_path/"x.rec").write_bytes(b"".join(containers.pack_record(p, l, k) for k, (p, l) in enumerate(zip(payloads, labels))))
    back = containers.read_rec(tmp_path/"x.rec")
    for k in range(20):
        stored = payloads[k].rstrip(b"\0") if isinstance(payloads[k], np.bytes_) else payloads[k]
        assert back.source.encoded(k) == stored
        assert back.identities[k] == np.ravel(labels[k])[0]


def test_recordio_bytes_are_those_of_the_format(tmp_path):
    "A record written by hand from the format's description: magic, part and length, header, padding."
    payload = struct.pack("<IfQQ", 0, 7., 42, 0) + b"jpegs"
    record = struct.pack("<II", 0xced7230a, len(payload)) + payload + b"\0"*3
    assert containers.pack_record(b"jpegs", 7, 42) == record


def test_a_large_record_and_a_multi_label(tmp_path):
    big = os.urandom(5_000_000)
    (tmp_path/"x.rec").write_bytes(containers.pack_record(b"a", [3, 1.5, 8], 0) + containers.pack_record(big, 4, 1))
    back = containers.read_rec(tmp_path/"x.rec")
    assert back.source.encoded(1) == big and list(back.identities) == [3, 4]
    np.testing.assert_array_equal(back.table.label_1, np.array([1.5, np.nan], np.float32))


@pytest.mark.parametrize("n", [0, 1, 3, 50, 700])
def test_lmdb_walk_agrees_with_liblmdb(tmp_path, n):
    "Values of sizes round the page limits, and enough of them for branch pages."
    lmdb = pytest.importorskip("lmdb")
    draw = np.random.default_rng(n)
    entries = {f"{k}".encode()*draw.integers(1, 4): os.urandom(int(draw.choice([0, 1, 100, 2000, 2030, 2040, 4080, 4096, 5000, 12288]))) for k in range(n)}
    with lmdb.open(str(tmp_path/"x"), map_size=1 << 30) as e:
        for chunk in range(0, n, 100):                                        # several transactions: freed pages, both meta pages
            with e.begin(write=True) as t:
                for k in list(entries)[chunk:chunk + 100]:
                    t.put(k, entries[k])
        with e.begin(write=True) as t:
            for k in list(entries)[::7]:
                t.delete(k)
                del entries[k]
    file = containers.OpenFile(tmp_path/"x"/"data.mdb")
    mine = [(k, file.read(o, m)) for k, o, m in containers.walk_lmdb(file)]
    with lmdb.open(str(tmp_path/"x"), readonly=True, lock=False) as e, e.begin() as t:
        assert mine == [(bytes(k), bytes(v)) for k, v in t.cursor()]


def test_lmdb_of_several_transactions(tmp_path):
    n = 9000
    r = Records.from_arrays(np.repeat(np.arange(9, dtype=np.uint8)[:, None, None, None]*25, 1000, 0)*np.ones((1, 2, 2, 3), np.uint8), identity=np.arange(n)//10)
    back = containers.read_lmdb(containers.write_lmdb(r, tmp_path/"x", format="png"))
    np.testing.assert_array_equal(back.identities, r.identities)
    np.testing.assert_array_equal(back.images([0, 4096, 4999, 8999]), r.images([0, 4096, 4999, 8999]))


def test_identities_as_objects_are_numbers_or_words():
    x = np.zeros((2, 2, 2, 3), np.uint8)
    assert Records.from_arrays(x, identity=np.array([3, 4], object)).identities.tolist() == [3, 4]
    assert Records.from_arrays(x, identity=["007", "8"]).identities.tolist() == ["007", "8"]
    assert Records.from_arrays(x, identity=[None, "8"]).identities.tolist() == [None, "8"]
    assert Records.from_arrays(x, identity=[None, "8"]).codes.tolist() == [-1, 0]


def test_lmdb_as_others_write_it(records, tmp_path):
    "Text-typed msgpack of old writers, and labels of every width."
    lmdb, msgpack = pytest.importorskip("lmdb"), pytest.importorskip("msgpack")
    labels = [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 5]
    with lmdb.open(str(tmp_path/"x"), map_size=1 << 28) as e, e.begin(write=True) as t:
        keys = [f"{k}".encode() for k in range(10)]
        for k, label in enumerate(labels):
            t.put(keys[k], msgpack.packb((images.encode_image(records.pixels(k)), label), use_bin_type=k % 2 == 0))
        t.put(b"__keys__", msgpack.packb(keys, use_bin_type=False))
        t.put(b"__len__", msgpack.packb(10))
        t.put(b"__classnum__", msgpack.packb(2**33))
    back = containers.read_lmdb(tmp_path/"x")
    assert list(back.identities) == labels and list(back.table.image) == [str(k) for k in range(10)]
    np.testing.assert_array_equal(back.images(), records.images(slice(0, 10)))


def test_zip_agrees_with_zipfile_deflated_and_zip64(records, tmp_path):
    with zipfile.ZipFile(tmp_path/"d.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(6):
            with z.open(zipfile.ZipInfo(f"a/{i}.png"), "w", force_zip64=True) as f:
                f.write(images.encode_image(records.pixels(i)))
        z.comment = b"a comment at the end"
    back = containers.read_zip(tmp_path/"d.zip")
    np.testing.assert_array_equal(back.images(), records.images(slice(0, 6)))
    assert back.identities.tolist() == [None]*6


def test_vectors_survive_saving(records, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((15, 7)).astype(np.float32)
    r = containers.read_zip(containers.write_zip(records, tmp_path/"x.zip", vectors))
    back = Records.load(r.select([3, 1]).save(tmp_path/"s"))
    np.testing.assert_array_equal(containers.vectors_of(back.table.label), vectors[[3, 1]])


def test_a_folder_of_containers_is_recognised(records, tmp_path):
    containers.write_rec(records, tmp_path/"faces"/"webface", format="png")
    back = formats.read_dataset(tmp_path/"faces")
    assert back.format == "rec" and len(back) == 15


def test_threads_may_share_a_source(records, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    path = containers.write_lmdb(records, tmp_path/"x", format="png")
    for _ in range(20):
        r = formats.read_dataset(path)
        with ThreadPoolExecutor(8) as pool:
            for i, x in zip(range(15), pool.map(r.pixels, range(15))):
                np.testing.assert_array_equal(x, records.pixels(i))


def test_stylegan_folder_equals_zip(records, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((15, 512)).astype(np.float32)
    path = containers.write_zip(records, tmp_path/"x.zip", vectors)
    with zipfile.ZipFile(path) as z:
        z.extractall(tmp_path/"x")
        assert json.loads(z.read("dataset.json"))["labels"][3][0] == "00000/img00000003.png"
    a, b = formats.read_dataset(path), formats.read_dataset(tmp_path/"x")
    assert b.format == "stylegan"
    np.testing.assert_array_equal(containers.vectors_of(b.table.label), vectors)
    np.testing.assert_array_equal(a.images(), b.images())


# --- .bin ---------------------------------------------------------------------------------------------------------

def blobs(records, n=6):
    return [images.encode_image(records.pixels(i)) for i in range(n)]


@pytest.mark.parametrize("protocol", range(6))
def test_bin_of_every_protocol(records, tmp_path, protocol):
    (tmp_path/"v.bin").write_bytes(pickle.dumps((blobs(records), [True, False, True]), protocol=protocol))
    back = containers.read_bin(tmp_path/"v.bin")
    np.testing.assert_array_equal(back.images(), records.images(slice(0, 6)))
    p = pairs.read_pairs(tmp_path/"v.bin")
    assert list(p.labels) == [True, False, True] and list(p.left) == [0, 2, 4]


@pytest.mark.parametrize("kind", ["numpy bool list", "numpy bool array", "numpy uint8 images", "0/1", "list not tuple", "bytearray"])
def test_bin_variants_that_tools_write(records, tmp_path, kind):
    b, same = blobs(records), [True, False, True]
    value = {"numpy bool list": (b, [np.bool_(s) for s in same]), "numpy bool array": (b, np.array(same)), "numpy uint8 images": ([np.frombuffer(x, np.uint8) for x in b], same),
             "0/1": (b, [1, 0, 1]), "list not tuple": [b, same], "bytearray": ([bytearray(x) for x in b], same)}[kind]
    for protocol in (2, 4, 5):
        (tmp_path/"v.bin").write_bytes(pickle.dumps(value, protocol=protocol))
        back = containers.read_bin(tmp_path/"v.bin")
        np.testing.assert_array_equal(back.images(), records.images(slice(0, 6)))
        assert list(back.table.same[::2]) == same


def test_bin_of_python_2(records, tmp_path):
    "Protocol 2 as Python 2 wrote it: byte strings by BINSTRING and SHORT_BINSTRING, booleans by NEWTRUE."
    b = blobs(records, 4)
    body = b"".join((b"U" + bytes([len(x)]) if len(x) < 256 else b"T" + struct.pack("<i", len(x))) + x + b"q" + bytes([k + 5]) for k, x in enumerate(b))
    (tmp_path/"v.bin").write_bytes(b"\x80\x02]q\x01(" + body + b"e]q\x02(\x88\x89e\x86q\x03.")
    back = containers.read_bin(tmp_path/"v.bin")
    np.testing.assert_array_equal(back.images(), records.images(slice(0, 4)))
    assert list(back.table.same) == [True, True, False, False]


def test_written_bin_is_what_insightface_unpickles(records, tmp_path):
    containers.write_bin(records.select(slice(0, 6)), [1, 0, 1], tmp_path/"v.bin", format="png")
    bins, same = pickle.loads((tmp_path/"v.bin").read_bytes())
    assert same == [True, False, True] and len(bins) == 6 and all(isinstance(x, bytes) for x in bins)


def test_bin_folds_are_kfold_without_shuffling(tmp_path):
    from sklearn.model_selection import KFold
    n = 37
    r = Records.from_arrays(np.zeros((2*n, 2, 2, 3), np.uint8), pair=np.repeat(np.arange(n), 2), same=np.zeros(2*n, bool))
    folds = pairs.bin_pairs(r).folds
    for f, (_, test) in enumerate(KFold(10).split(np.zeros(n))):
        np.testing.assert_array_equal(np.flatnonzero(folds == f), test)


# --- laziness and processes ---------------------------------------------------------------------------------------

def test_an_index_of_many_images_is_a_few_dozen_bytes_per_image():
    import pyarrow as pa
    n = 400_000
    names = pa.chunked_array([pa.array([f"{i//50:06d}/{i % 50:03d}.jpg" for i in range(a, a + 100_000)], pa.large_string()) for a in range(0, n, 100_000)])
    names, parts = formats.fields_of(names, r"^(?P<identity>[^/]+)/[^/]+$", "", "root", "raise", Skipped())
    r = formats._folder_records("/nowhere", names, dict(identity=formats.words(parts["identity"])), Skipped())
    assert r.table.memory_usage(deep=True).sum() < 32*n                       # 10 million: 0.3 GB, of which the names are most
    assert len(pickle.dumps(r.source)) < 32*n
    assert len(r.select("identity == '000007'")) == 50


def test_many_records_are_indexed_in_seconds(tmp_path):
    "Only headers are read: 16 bytes per image beside the table."
    import time
    n = 300_000
    one = containers.pack_record(b"\xff\xd8tiny", 5, 0)
    (tmp_path/"x.rec").write_bytes(one*n)
    pd.DataFrame(dict(k=np.arange(n), o=np.arange(n)*len(one))).to_csv(tmp_path/"x.idx", sep="\t", header=False, index=False)
    start = time.process_time()
    r = containers.read_rec(tmp_path/"x.rec")
    assert time.process_time() - start < 10 and len(r) == n
    assert r.source.offsets.nbytes + r.source.lengths.nbytes == 16*n
    assert r.source.encoded(n - 1) == b"\xff\xd8tiny"


def _sum_in_child(r):
    return float(r.images([1, 3]).sum())


@pytest.mark.parametrize("form", ["native", "rec", "lmdb", "zip"])
def test_sources_travel_to_other_processes(records, tmp_path, form):
    path = dict(native=lambda: records.save(tmp_path/"n"), rec=lambda: containers.write_rec(records, tmp_path/"t", format="png"),
                lmdb=lambda: containers.write_lmdb(records, tmp_path/"x", format="png"), zip=lambda: containers.write_zip(records, tmp_path/"x.zip"))[form]()
    r = formats.read_dataset(path)
    r.images([0])                                                            # opened here; must be opened again there
    copy = pickle.loads(pickle.dumps(r))
    assert _sum_in_child(copy) == _sum_in_child(r)
    if hasattr(os, "fork"):
        out, into = os.pipe()
        if (child := os.fork()) == 0:
            os.write(into, struct.pack("<d", _sum_in_child(r)))
            os._exit(0)
        os.waitpid(child, 0)
        assert struct.unpack("<d", os.read(out, 8))[0] == _sum_in_child(r)


def test_batches_cover_everything_once_and_stop_early_cleanly(records):
    for ahead in (0, 1, 3):
        got = list(records.batches(4, ahead=ahead))
        np.testing.assert_array_equal(np.concatenate([i for i, _ in got]), np.arange(15))
        np.testing.assert_array_equal(np.concatenate([x for _, x in got]), records.images())
        walk = records.batches(4, ahead=ahead)
        next(iter(walk))
        del walk
    with pytest.raises(ConfigError):
        records.batches(0)


def test_selection_of_a_selection_reads_the_right_pixels(records):
    twice = records.select(np.arange(14, -1, -1)).select("age > 0").select([3, -1])
    np.testing.assert_array_equal(twice.pixels(0), records.pixels(11))
    np.testing.assert_array_equal(twice.pixels(1), records.pixels(0))
    assert list(twice.table.identity.cat.categories) == ["p0", "p3"]


@pytest.mark.parametrize("columns, message", [
    (dict(age=[np.inf]*15), "infinite"), (dict(age=["old"]*15), "numbers"), (dict(gender=["x"]*15), "female or male"), (dict(image=["same"]*15), "same image name"),
    (dict(identity=[1, 2]), "2 values for 15"), (dict(identity=np.linspace(0, 1, 15)), "whole numbers or words"), (dict(image=[None]*15), "empty entries")])
def test_bad_columns_are_refused(columns, message):
    with pytest.raises(DataError, match=message):
        Records.from_arrays(np.zeros((15, 4, 4, 3), np.uint8), **columns)


def test_images_of_different_sizes_need_a_size(tmp_path):
    for name, side in (("a/1.png", 10), ("a/2.png", 12)):
        (tmp_path/"a").mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(images.encode_image(np.zeros((side, side, 3), np.uint8)))
    r = formats.read_folder(tmp_path)
    with pytest.raises(DataError, match="size=112"):
        r.images()
    assert r.images(size=8).shape == (2, 3, 8, 8) and r.images([], size=8).shape == (0, 3, 8, 8)


# --- real data -----------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(data_dir("lfw") is None, reason="HYPERFACE_DATA names no folder with lfw")


@pytest.fixture(scope="module")
def lfw():
    return formats.read_dataset(data_dir("lfw"))


@real
def test_lfw_has_its_numbers(lfw):
    assert (len(lfw), lfw.table.identity.nunique()) == (13233, 5749)
    assert (lfw.table.gender == "male").sum() > 10_000 and (lfw.table.gender == "female").sum() > 2_900
    official = pairs.read_pairs(data_dir("lfw")/"pairs.txt", lfw)
    assert len(official) == 6000 and official.labels.sum() == 3000 and (np.bincount(official.folds) == 600).all()
    np.testing.assert_array_equal(official.labels, lfw.codes[official.left] == lfw.codes[official.right])
    assert len(pairs.read_pairs(data_dir("lfw")/"pairsDevTrain.txt", lfw)) == 2200
    small = pairs.read_pairs(data_dir("lfw")/"pairs_600.txt", lfw)
    assert len(small) == 600 and len(small.used) == 901


@real
def test_fast_path_equals_pillow_on_lfw(lfw):
    from PIL import Image
    for i in np.random.default_rng(0).choice(len(lfw), 100, replace=False):
        with Image.open(lfw.source.where(int(i))) as im:
            np.testing.assert_array_equal(lfw.pixels(int(i)), np.asarray(im.convert("RGB")))


@real
def test_lfw_through_every_container(lfw, tmp_path):
    some = lfw.select(slice(0, 40))
    for path in (containers.write_rec(some, tmp_path/"t"), containers.write_lmdb(some, tmp_path/"x"), containers.write_zip(some, tmp_path/"x.zip"), containers.write_bin(some, [True]*20, tmp_path/"x.bin")):
        back = formats.read_dataset(path)
        assert [back.source.encoded(i) for i in range(40)] == [some.source.encoded(i) for i in range(40)]   # byte for byte: no second JPEG


@real
@pytest.mark.parametrize("name, n", [("utkface", 2956), ("fer2013", 1435), ("ckplus48", 981)])
def test_other_real_sets(name, n):
    if data_dir(name) is None:
        pytest.skip(f"HYPERFACE_DATA has no {name}")
    r = formats.read_dataset(data_dir(name))
    assert len(r) == n and not r.skipped
    if name == "utkface":
        labels = pd.read_csv(data_dir(name)/"utkface_labels.csv").set_index("file").loc[r.table.image]
        np.testing.assert_array_equal(r.table.age, labels.age)
        np.testing.assert_array_equal(r.table.gender == "female", labels.gender == 1)
        np.testing.assert_array_equal(r.table.ethnicity, np.array(formats.UTK_RACES)[labels.race])


@real
def test_photographs_are_not_shown_when_publishing(lfw, monkeypatch):
    monkeypatch.setenv("HYPERFACE_PUBLISH", "1")
    assert lfw.hidden and lfw.select(slice(0, 4)).hidden and lfw._repr_jpeg_() is None
    monkeypatch.setenv("HYPERFACE_PUBLISH", "0")
    assert lfw.select(slice(0, 4))._repr_jpeg_()[:2] == b"\xff\xd8"


# --- drawing pairs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_drawn_pairs_are_distinct_correct_and_disjoint(seed):
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 12, 300)
    n = counts.sum()
    r = Records.from_arrays(np.zeros((n, 1, 1, 3), np.uint8), identity=np.repeat(np.arange(300), counts), gender=np.repeat(draw.choice(["f", "m"], 300), counts))
    p = pairs.draw_pairs(r, 1000, 900, seed=seed, folds=7, within="gender")
    assert (p.labels == (r.codes[p.left] == r.codes[p.right])).all() and (p.left != p.right).all()
    keys = np.minimum(p.left, p.right)*n + np.maximum(p.left, p.right)
    assert len(np.unique(keys)) == 1900 == len(p) and p.labels.sum() == 1000
    fold_of = {}
    for side in (p.left, p.right):
        for c, f in zip(r.codes[side], p.folds):
            assert fold_of.setdefault(c, f) == f
    g = r.table.gender.to_numpy()
    assert (g[p.left] == g[p.right])[~p.labels].all()
    assert np.ptp(np.bincount(p.folds[p.labels])) <= 1 and np.ptp(np.bincount(p.folds[~p.labels])) <= 1


def test_large_draw_by_rejection_is_distinct():
    r = Records.from_arrays(np.zeros((20_000, 1, 1, 3), np.uint8), identity=np.arange(20_000)//20)
    p = pairs.draw_pairs(r, 10_000, 10_000, folds=1)
    keys = np.minimum(p.left, p.right)*20_000 + np.maximum(p.left, p.right)
    assert len(np.unique(keys)) == 20_000


@pytest.mark.parametrize("change, message", [(dict(n_genuine=10**6), "different genuine pairs"), (dict(folds=400), "cannot be made"), (dict(within="ethnicity"), "no column"), (dict(folds=0), "at least 1")])
def test_impossible_draws_say_why(change, message):
    r = Records.from_arrays(np.zeros((600, 1, 1, 3), np.uint8), identity=np.arange(600)//2)
    with pytest.raises((DataError, ConfigError), match=message):
        pairs.draw_pairs(r, **{**dict(n_genuine=100, n_impostor=100), **change})


def test_every_impostor_pair_of_a_set_of_nearly_one_person():
    r = Records.from_arrays(np.zeros((1002, 1, 1, 3), np.uint8), identity=np.array([0]*1000 + [1, 2]))
    p = pairs.draw_pairs(r, 10, 2001, folds=1)                                # 2001 impostor pairs among 501,501
    assert len(np.unique(np.minimum(p.left, p.right)[~p.labels]*2000 + np.maximum(p.left, p.right)[~p.labels])) == 2001
    assert (r.codes[p.left] != r.codes[p.right])[~p.labels].all()


def lopsided():
    "As many images per person as in LFW: most have one, one has 530."
    counts = np.concatenate([[530, 236, 144, 121, 109], np.random.default_rng(0).geometric(.25, 900) + 1, np.ones(4000, int)])
    return Records.from_arrays(np.zeros((counts.sum(), 1, 1, 3), np.uint8), name="lopsided", identity=np.repeat(np.arange(len(counts)), counts))


def test_one_person_with_most_of_the_pairs_does_not_get_a_fold_to_himself():
    r = lopsided()
    p = pairs.draw_pairs(r)
    assert len(p) == 20_000 and (np.bincount(p.folds) == 2000).all()
    people = [len(np.unique(r.codes[np.concatenate([p.left[p.folds == f], p.right[p.folds == f]])])) for f in range(10)]
    assert min(people) > .7*max(people)


@real
def test_pairs_can_be_drawn_from_lfw(lfw):
    p = pairs.draw_pairs(lfw, within="gender", seed=3)
    g = lfw.table.gender.astype(object).to_numpy()
    assert len(p) == 20_000 and (g[p.left] == g[p.right])[~p.labels].all()
    with pytest.raises(DataError, match="All folds together have"):
        pairs.draw_pairs(lfw, per_identity=1)


def test_no_identities_no_pairs():
    with pytest.raises(DataError, match="no identities"):
        pairs.draw_pairs(Records.from_arrays(np.zeros((4, 1, 1, 3), np.uint8)), 1, 1)


def test_scores_are_row_wise_cosines():
    r = Records.from_arrays(np.zeros((50, 1, 1, 3), np.uint8), identity=np.arange(50)//5)
    x = np.random.default_rng(0).standard_normal((50, 512)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    p = pairs.draw_pairs(r, 20, 30, folds=2)
    np.testing.assert_allclose(p.scores(x), (x[p.left].astype(float)*x[p.right]).sum(1), atol=1e-12)
    c = p.compact()
    np.testing.assert_allclose(c.scores(x[p.used]), p.scores(x), atol=1e-12)
    with pytest.raises(DataError, match="one row for each"):
        p.scores(x[:10])

"""WebDataset shards: parity with the library in both directions, every tar dialect, and shards that are cut, planted or mislabelled."""
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hyperface.core import ConfigError, DataError, HyperfaceError
from hyperface.data import formats, webdataset as ours
from hyperface.data.containers import vector_column, vectors_of
from hyperface.data.images import decode_image, encode_image
from hyperface.data.records import Records

FACE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
PNG, JPG = encode_image(FACE), encode_image(FACE, "jpg")


def make(n=23, size=16, seed=0):
    "Random pictures with every kind of column, and names that hold dots and folders."
    draw = np.random.default_rng(seed)
    return Records.from_arrays(draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8), name="made", image=[f"p.{i//4}/Jr. {i}.x" for i in range(n)],
                               identity=[f"p{i//4}" for i in range(n)], age=draw.integers(1, 90, n), gender=draw.choice(["female", "male"], n),
                               yaw=[None if i % 5 == 0 else float(v) for i, v in enumerate(draw.normal(0, 20, n))], glasses=draw.random(n) < .5,
                               label=vector_column(draw.normal(size=(n, 7))), note=[None if i % 2 else "ü" for i in range(n)])


@pytest.fixture
def library():
    return pytest.importorskip("webdataset")


@pytest.fixture
def records():
    return make()


def tar(path, *entries, format=tarfile.USTAR_FORMAT):
    "A tar by the standard library; an entry is (name, content) or (name, content, type)."
    with tarfile.open(path, "w", format=format) as t:
        for name, content, *kind in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if kind:
                info.type, info.linkname = kind[0], "/etc/passwd"
            t.addfile(info, io.BytesIO(content))
    return path


# --- round trips and parity ------------------------------------------------------------------------------------------

def test_round_trip_keeps_pixels_and_columns(records, tmp_path, library):
    folder = ours.write_webdataset(records, tmp_path/"set", shard_size=10, format="png")
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    back = ours.read_webdataset(folder)
    np.testing.assert_array_equal(back.images(), records.images())
    plain = [c for c in records.table if c not in ("label", "note")]
    pd.testing.assert_frame_equal(back.table[plain], records.table[plain])
    np.testing.assert_array_equal(vectors_of(back.table.label), vectors_of(records.table.label))
    assert back.table.note.where(back.table.note.notna(), None).tolist() == records.table.note.where(records.table.note.notna(), None).tolist()
    assert back.name == "made" and list(back.table) == list(records.table) and not back.skipped


def test_the_library_reads_what_we_wrote(records, tmp_path, library):
    folder = ours.write_webdataset(records, tmp_path/"set", shard_size=10, format="png")
    seen = [s for path in sorted(folder.glob("*.tar")) for s in library.WebDataset(str(path), shardshuffle=False, empty_check=False)]
    assert len(seen) == len(records)
    for i, sample in enumerate(seen):
        assert set(sample) >= {"__key__", "png", "json"} and sample["__key__"] == f"{i:09d}"
        np.testing.assert_array_equal(decode_image(sample["png"]), records.pixels(i))
        told = json.loads(sample["json"])
        assert told["identity"] == records.table.identity[i] and told["image"] == records.table.image[i] and ("yaw" in told) == (i % 5 != 0)


def test_we_read_what_the_library_wrote(tmp_path, library):
    with library.ShardWriter(str(tmp_path/"x-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"s/{i:03d}", "jpg": JPG, "cls": i % 3})
    back = ours.read_webdataset(tmp_path)
    assert len(back) == 10 and back.identities.tolist() == [i % 3 for i in range(10)] and back.table.image[7] == "s/007"
    assert back.source.encoded(7) == JPG


def test_equal_records_give_equal_bytes(records, tmp_path, library, monkeypatch):
    a = ours.write_webdataset(records, tmp_path/"a", shard_size=9)
    monkeypatch.setattr("time.time", lambda: 4e9)
    b = ours.write_webdataset(make(), tmp_path/"b", shard_size=9)
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_encoded_pictures_are_copied(tmp_path, library):
    tar(tmp_path/"x.tar", ("a.jpg", JPG), ("b.png", PNG))
    folder = ours.write_webdataset(ours.read_webdataset(tmp_path/"x.tar"), tmp_path/"set")
    back = ours.read_webdataset(folder)
    assert [back.source.encoded(0), back.source.encoded(1)] == [JPG, PNG] and back.table.image.tolist() == ["a", "b"]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(4))
def test_walk_agrees_with_tarfile(dialect, seed, tmp_path):
    "Random names and sizes; offsets and lengths as the standard library finds them."
    draw = np.random.default_rng(seed)
    longest = 95 if dialect == tarfile.USTAR_FORMAT else 300
    entries = [(f"{'d'*draw.integers(1, longest)}/{'f'*draw.integers(1, 90)}{k}.bin", draw.bytes(draw.integers(0, 3000))) for k in range(30)]
    path = tar(tmp_path/"x.tar", *entries, format=dialect)
    with tarfile.open(path) as t:
        theirs = [(m.name, m.offset_data, m.size, None) for m in t]
    assert list(ours.walk_tar(ours.OpenFile(path))) == theirs


def test_tar_made_by_the_program_of_that_name(tmp_path):
    (tmp_path/"in"/"p1").mkdir(parents=True)
    (tmp_path/"in"/"p1"/"001.png").write_bytes(PNG)
    (tmp_path/"in"/"p1"/"001.json").write_text('{"identity": "p1", "age": 30}')
    (tmp_path/"in"/".hidden").write_bytes(b"x")
    subprocess.run(["tar", "cf", str(tmp_path/"x.tar"), "-C", str(tmp_path/"in"), "."], check=True)
    back = ours.read_webdataset(tmp_path/"x.tar")
    assert back.table.image.tolist() == ["p1/001"] and back.table.age.tolist() == [30] and back.identities.tolist() == ["p1"]
    np.testing.assert_array_equal(back.pixels(0), FACE)


def test_read_dataset_recognises_shards(records, tmp_path, library):
    folder = ours.write_webdataset(records, tmp_path/"set", format="png")
    for path in (folder, folder/"shard-000000.tar"):
        back = formats.read_dataset(path, check=True)
        assert back.format == "webdataset" and len(back) == len(records)
    records.save(tmp_path/"plain")
    (tmp_path/"plain"/"records.parquet").unlink()
    (tmp_path/"plain"/"as_downloaded.tar").write_bytes(b"x")
    assert formats.detect_format(tmp_path/"plain") != "webdataset"                   # pictures beside an archive are the set


def test_nothing_is_decoded_and_nothing_stays_open(records, tmp_path, library, monkeypatch):
    folder = ours.write_webdataset(records, tmp_path/"set", shard_size=1, format="png")
    monkeypatch.setattr("hyperface.data.records.decode_image", lambda *a: pytest.fail("a picture was decoded"))
    back = ours.read_webdataset(folder)
    for i in range(len(back)):
        back.source.encoded(i)
    held = [os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.exists()] if Path("/proc/self/fd").is_dir() else []
    assert not [p for p in held if str(folder) in p]
    again = pickle.loads(pickle.dumps(back.source))                                  # for loaders with several processes
    assert again.encoded(5) == back.source.encoded(5)


def test_selection_is_written_in_its_order(records, tmp_path, library):
    some = records.select([20, 3, 11])
    back = ours.read_webdataset(ours.write_webdataset(some, tmp_path/"set", format="png"))
    np.testing.assert_array_equal(back.images(), some.images())
    assert back.identities.tolist() == some.identities.tolist()


def test_an_empty_set(records, tmp_path, library):
    assert len(ours.read_webdataset(ours.write_webdataset(records.select([]), tmp_path/"set"))) == 0


# --- writing that goes wrong -----------------------------------------------------------------------------------------

def test_a_killed_run_leaves_whole_shards_and_no_index(records, tmp_path, library, monkeypatch):
    once = ours.write_webdataset(records, tmp_path/"a", shard_size=10, format="png")

    def killed(labels, real=ours.label_bytes):
        if labels["image"] == records.table.image[15]:
            raise KeyboardInterrupt
        return real(labels)
    monkeypatch.setattr(ours, "label_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        ours.write_webdataset(records, tmp_path/"b", shard_size=10, format="png")
    assert [p.name for p in (tmp_path/"b").iterdir()] == ["shard-000000.tar"]
    assert (tmp_path/"b"/"shard-000000.tar").read_bytes() == (once/"shard-000000.tar").read_bytes()


def test_overwriting_leaves_no_old_shard(records, tmp_path, library):
    ours.write_webdataset(records, tmp_path/"a", shard_size=3)
    with pytest.raises(DataError, match="not empty"):
        ours.write_webdataset(records, tmp_path/"a", shard_size=20)
    (tmp_path/"a"/"README").write_text("keep me")
    ours.write_webdataset(records.select(slice(0, 5)), tmp_path/"a", shard_size=20, overwrite=True)
    assert sorted(p.name for p in (tmp_path/"a").iterdir()) == ["README", "index.json", "shard-000000.tar"] and len(ours.read_webdataset(tmp_path/"a")) == 5


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "10"])
def test_shard_sizes_that_make_no_sense(size, records, tmp_path, library):
    with pytest.raises(ConfigError, match="shard_size"):
        ours.write_webdataset(records, tmp_path/"a", shard_size=size)


def test_labels_that_are_not_json_are_refused(records, tmp_path, library):
    records.table["odd"] = [{1, 2}]*len(records)
    with pytest.raises(DataError, match="JSON"):
        ours.write_webdataset(records, tmp_path/"a")
    records.table["odd"] = np.inf
    with pytest.raises(DataError, match="JSON"):
        ours.write_webdataset(records, tmp_path/"a")
    assert not list((tmp_path/"a").glob("*"))


def test_without_the_library_reading_works_and_writing_says_what_to_install(tmp_path, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ConfigError, match=r"pip install hyperface\[webdataset\]"):
        ours.write_webdataset(records, tmp_path/"a")
    assert not (tmp_path/"a").exists()
    assert len(ours.read_webdataset(tar(tmp_path/"x.tar", ("a.jpg", JPG)))) == 1


def test_our_module_does_not_stand_in_the_way_of_the_library(library):
    assert "hyperface" not in Path(library.__file__).parts[-3:] and library is not ours and hasattr(library, "TarWriter")
    assert ours._library() is library


# --- shards that are damaged or hostile ------------------------------------------------------------------------------

BAD = {
    "dots": ((("../../a.png", PNG),), "leads out"), "absolute": ((("/etc/a.png", PNG),), "leads out"), "drive": ((("C:a.png", PNG),), "leads out"), "backslash": ((("a\\..\\..\\b.png", PNG),), "leads out"),
    "dots in the JSON": ((("a.png", PNG), ("a.json", b'{"image": "../../x"}')), "leads out"), "a number as name": ((("a.png", PNG), ("a.json", b'{"image": 7}')), "leads out"),
    "symbolic link": ((("a.png", b"", tarfile.SYMTYPE),), "symbolic link"), "hard link": ((("a.png", b"", tarfile.LNKTYPE),), "hard link"), "device": ((("a.png", b"", tarfile.CHRTYPE),), "device"), "pipe": ((("a.png", b"", tarfile.FIFOTYPE),), "pipe"),
    "two pictures": ((("a.png", PNG), ("a.jpg", JPG)), "2 pictures"), "no picture": ((("a.json", b"{}"),), "no picture"), "the same file twice": ((("a.png", PNG), ("a.png", JPG)), "twice"),
    "a key comes back": ((("a.png", PNG), ("b.png", PNG), ("a.jpg", JPG)), "twice"), "empty picture": ((("a.png", b""),), "0 bytes"),
    "labels no JSON": ((("a.png", PNG), ("a.json", b"{")), "not JSON"), "labels a list": ((("a.png", PNG), ("a.json", b"[1]")), "not an object"), "labels too deep": ((("a.png", PNG), ("a.json", b"["*100_000)), "not JSON"),
    "labels binary": ((("a.png", PNG), ("a.json", b"\xff\xfe\0")), "not JSON"), "label NaN": ((("a.png", PNG), ("a.json", b'{"age": NaN}')), "no number of JSON"), "labels huge": ((("a.png", PNG), ("a.json", b" "*(2**20 + 1) + b"{}")), "bytes of labels"),
    "class is a word": ((("a.png", PNG), ("a.cls", b"seven")), "class number"), "class below zero": ((("a.png", PNG), ("a.cls", b"-1")), "class number"), "class of many digits": ((("a.png", PNG), ("a.cls", b"9"*400)), "class number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_named_or_skipped(kind, tmp_path):
    entries, message = BAD[kind]
    path = tar(tmp_path/"x.tar", ("good.png", PNG), *entries, ("last.png", PNG))
    with pytest.raises(DataError, match=message) as e:
        ours.read_webdataset(path)
    assert "x.tar" in str(e.value)
    rest = ours.read_webdataset(path, on_error="skip")
    assert {"good", "last"} <= set(rest.table.image) and len(rest.skipped) >= 1
    rest.images(size=8)


@pytest.mark.parametrize("label, message", [
    (b'{"age": 300}', "130"), (b'{"age": "old"}', "kinds|numbers"), (b'{"gender": "robot"}', "female or male"), (b'{"x": {"y": 1}}', "Label x"), (b'{"x": [1, [2]]}', "Label x"), (b'{"x": [1e39]}', "Label x"), (b'{"x": 1' + b"0"*400 + b"}", "Label x|not JSON"),
    (b'{"x": []}', "Label x"), (json.dumps({f"k{i}": 1 for i in range(500)}).encode(), "501 different labels")])  # and the name of the picture
def test_columns_that_make_no_sense(label, message, tmp_path):
    path = tar(tmp_path/"x.tar", ("a.png", PNG), ("a.json", label))
    with pytest.raises(DataError, match=message) as e:
        ours.read_webdataset(path)
    assert str(e.value).count("x.tar") == 1


def test_a_column_that_makes_no_sense_is_left_out_on_request(tmp_path):
    path = tar(tmp_path/"x.tar", ("a.png", PNG), ("a.json", b'{"x": {"y": 1}, "age": 7}'), ("b.png", PNG), ("b.json", b'{"x": 3}'))
    back = ours.read_webdataset(path, on_error="skip")
    assert "x" not in back.table and back.table.age.iloc[0] == 7 and np.isnan(back.table.age.iloc[1]) and len(back.skipped) == 1


def test_whole_numbers_and_words_as_identities(tmp_path):
    for values, expected in (((3, 5), [3, 5]), ((3, None), ["3", None]), ((3, "Ann"), ["3", "Ann"])):
        entries = [e for k, v in enumerate(values) for e in ((f"{k}.png", PNG), (f"{k}.json", json.dumps({"identity": v}).encode()))]
        assert ours.read_webdataset(tar(tmp_path/"x.tar", *entries)).identities.tolist() == expected


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    whole = tar(tmp_path/"x.tar", ("a.png", PNG), ("a.json", b'{"identity": 1}'), ("b.png", PNG)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    ends = [offset + (size + 511)//512*512 for _, offset, size, _ in ours.walk_tar(ours.OpenFile(tmp_path/"x.tar"))]
    for at in {*range(1, end, 97), *ends}:
        (tmp_path/"x.tar").write_bytes(whole[:at])
        with pytest.raises(DataError, match="x.tar"):
            ours.read_webdataset(tmp_path/"x.tar")
        assert len(ours.read_webdataset(tmp_path/"x.tar", on_error="skip")) <= (2 if at >= ends[-1] else 1)


def test_a_huge_declared_size_and_name_cost_nothing(tmp_path):
    whole = bytearray(tar(tmp_path/"x.tar", ("a.png", PNG)).read_bytes())

    def planted(**fields):
        head = bytearray(whole[:512])
        for at, value in fields.values():
            head[at:at + len(value)] = value
        head[148:156] = b" "*8
        head[148:156] = b"%06o\0 " % sum(head)
        (tmp_path/"x.tar").write_bytes(bytes(head) + whole[512:])
    for size in (b"77777777777\0", b"\x80" + b"\xff"*11, b"\xff"*12, b"-0000000001\0", b"9999\0"):
        planted(size=(124, size))
        with pytest.raises(DataError, match="entry of"):
            ours.read_webdataset(tmp_path/"x.tar")
    big = b"x"*200_000
    tar(tmp_path/"x.tar", ("a.png", big))
    whole = bytearray((tmp_path/"x.tar").read_bytes())
    planted(kind=(156, b"L"))
    with pytest.raises(DataError, match="a name of 200,000 bytes"):
        ours.read_webdataset(tmp_path/"x.tar")


@pytest.mark.parametrize("content, message", [(b"", "empty"), (b"\x1f\x8b\x08" + bytes(2000), "unpack it first"), (PNG*40, "no header"), (bytes(1024), None)])
def test_things_that_are_no_tar(content, message, tmp_path):
    (tmp_path/"x.tar").write_bytes(content)
    if message is None:
        assert len(ours.read_webdataset(tmp_path/"x.tar")) == 0                      # two empty headers: a tar without files
    else:
        with pytest.raises(DataError, match=message):
            ours.read_webdataset(tmp_path/"x.tar")


@pytest.mark.parametrize("index, message", [("{", "not JSON"), ("[]", "not an index"), ('{"shardlist": [{"url": 3, "nsamples": 1}]}', "not an index"), ('{"shardlist": [{"url": "../x.tar", "nsamples": 1}]}', "leads out"),
                                            ('{"shardlist": [{"url": "gone.tar", "nsamples": 1}]}', "gone.tar"), ('{"shardlist": [{"url": "x.tar", "nsamples": 9}]}', "index.json says 9")])
def test_an_index_that_does_not_fit(index, message, tmp_path):
    (tmp_path/"set").mkdir()
    tar(tmp_path/"set"/"x.tar", ("a.png", PNG))
    (tmp_path/"set"/"index.json").write_text(index)
    with pytest.raises(DataError, match=message):
        ours.read_webdataset(tmp_path/"set")


def test_folders_without_shards(tmp_path):
    with pytest.raises(DataError, match="no .tar"):
        ours.read_webdataset(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        ours.read_webdataset(tmp_path/"nowhere")


def test_a_shard_that_is_gone_or_shorter_later(tmp_path):
    back = ours.read_webdataset(tar(tmp_path/"x.tar", ("a.png", PNG)))
    (tmp_path/"x.tar").write_bytes(b"short")
    with pytest.raises(DataError, match="shorter"):
        back.pixels(0)
    (tmp_path/"x.tar").unlink()
    with pytest.raises(DataError, match="x.tar cannot be read"):
        back.pixels(0)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_gives_records_or_a_data_error(seed, tmp_path):
    draw = np.random.default_rng(seed)
    entries = [e for k in range(6) for e in ((f"{'n'*(k*25 + 1)}/{k}.png", PNG), (f"{'n'*(k*25 + 1)}/{k}.json", b'{"identity": 3, "age": 20.5}'))]
    content = bytearray(tar(tmp_path/"x.tar", *entries, format=[tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][seed % 3]).read_bytes())
    for at in draw.integers(0, len(content), 1 + seed % 8):
        content[at:at + 4] = draw.bytes(4) if seed % 3 else b"\xff"*4
    (tmp_path/"x.tar").write_bytes(content[:draw.integers(1, len(content))] if seed % 4 == 0 else content)
    for on_error in ("raise", "skip"):
        try:
            r = formats.read_dataset(tmp_path/"x.tar", on_error=on_error, check=True)
            r.images(size=8)
        except HyperfaceError as e:
            assert "x.tar" in str(e)

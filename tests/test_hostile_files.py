"""Corrupt, truncated, mislabelled and hostile files: a DataError that names the file, never a crash, a hang or a wrong picture."""
import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from hyperface.core import DataError, HyperfaceError
from hyperface.data import containers, formats, images, pairs
from hyperface.data.images import decode_image, encode_image
from hyperface.data.records import Records

FACE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
PNG, JPG = encode_image(FACE), encode_image(FACE, "jpg")


def pil(array, format="PNG", mode=None, **options):
    from PIL import Image
    buffer = io.BytesIO()
    im = Image.fromarray(array)
    (im.convert(mode) if mode else im).save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth=8, colour=2, data=b"", *extra):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + b"".join(extra) + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


def with_jpeg_size(h, w):
    at = JPG.find(b"\xff\xc0")
    return JPG[:at + 5] + struct.pack(">HH", h, w) + JPG[at + 9:]


# --- pictures -------------------------------------------------------------------------------------------------------

BAD_PICTURES = {
    "empty": b"", "one byte": b"\xff", "text": b"not a picture at all", "web page": b"<!DOCTYPE html><html>404</html>", "zeros": bytes(5000),
    "jpeg header only": JPG[:20], "jpeg without end": JPG[:-2], "jpeg half": JPG[:len(JPG)//2], "jpeg three bytes": b"\xff\xd8\xff", "jpeg of nothing": b"\xff\xd8\xff\xd9",
    "jpeg 0 x 0": with_jpeg_size(0, 0), "jpeg 65500 x 65500": with_jpeg_size(65500, 65500),
    "jpeg with endless markers": b"\xff\xd8" + b"\xff\xe0\0\2"*20000, "jpeg with endless fill": b"\xff\xd8" + b"\xff"*200000,
    "png half": PNG[:len(PNG)//2], "png signature": PNG[:8], "png 60000 x 60000": png(60000, 60000), "png 0 x 5": png(0, 5), "png 2^31": png(2**31 - 1, 2**31 - 1),
    "png too little data": png(500, 500, data=b"\0"*100), "png wrong checksum": PNG[:40] + bytes([PNG[40] ^ 1]) + PNG[41:], "png depth 77": png(4, 4, depth=77),
    "png bomb of text": png(4, 4, 8, 2, b"\0"*52, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "gif half": pil(FACE, "GIF")[:300], "bmp 30000 x 30000": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff loop": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 256, 4, 1, 8) + b"\x08\0\0\0", "webp half": pil(FACE, "WEBP")[:60],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(x) run\n", "svg": b"<?xml version='1.0'?><svg/>", "pdf": b"%PDF-1.4\n", "pickle": pickle.dumps(FACE),
    "numpy": b"\x93NUMPY\1\0v\0{'descr': '|u1'}", "ppm 99999 x 99999": b"P6 99999 99999 255\n", "float with NaN": pil(np.full((4, 4), np.nan, np.float32), "TIFF"),
    "float of no scale": pil(np.full((4, 4), -7e8, np.float32), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_are_refused_by_name(kind, tmp_path):
    path = tmp_path/"somebody.jpg"
    path.write_bytes(BAD_PICTURES[kind])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for source, name in ((path, None), (BAD_PICTURES[kind], "somebody.jpg")):
        with pytest.raises(DataError, match=r"somebody\.jpg"):
            decode_image(source, name)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000           # kB: no bomb went off


GOOD_PICTURES = {
    "16-bit grey": pil((FACE[..., 0].astype(np.uint16)*257)), "palette": pil(FACE, mode="P"), "1 bit": pil(FACE, mode="1"), "grey and alpha": pil(FACE, mode="LA"), "CMYK": pil(FACE, "JPEG", "CMYK"),
    "trailing garbage": JPG + b"garbage"*100, "progressive": pil(FACE, "JPEG", progressive=True), "damaged EXIF": pil(FACE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff"),
    "orientation 99": pil(FACE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63\0\0\0\0\0\0"), "two frames": None, "1 x 1": encode_image(FACE[:1, :1]), "5000 x 1": encode_image(np.zeros((1, 5000, 3), np.uint8)),
    "jpeg with a header of length 0": b"\xff\xd8\xff\xe0\0\0" + JPG[20:], "grey jpeg": pil(FACE, "JPEG", "L"), "YCbCr tiff": pil(FACE, "TIFF", "YCbCr"), "Lab tiff": pil(FACE, "TIFF", "LAB"),
}


@pytest.mark.parametrize("kind", GOOD_PICTURES)
def test_odd_pictures_are_read(kind):
    from PIL import Image
    content = GOOD_PICTURES[kind]
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(FACE).save(buffer, "GIF", save_all=True, append_images=[Image.fromarray(255 - FACE)])
        content = buffer.getvalue()
    out = decode_image(content)
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3
    if kind == "16-bit grey":
        np.testing.assert_array_equal(out[..., 0], FACE[..., 0])
    if kind in ("trailing garbage", "damaged EXIF", "orientation 99"):
        np.testing.assert_array_equal(out.shape, FACE.shape)


def test_transparent_is_white_and_colours_under_it_are_gone():
    rgba = np.concatenate([FACE, np.zeros((24, 24, 1), np.uint8)], -1)
    assert (decode_image(pil(rgba)) == 255).all()
    assert (decode_image(pil(rgba), background=(1, 2, 3)) == (1, 2, 3)).all()


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    (tmp_path/"loop").symlink_to(tmp_path/"loop")
    (tmp_path/"big").touch()
    os.truncate(tmp_path/"big", 2**33)                                                     # sparse: 8 GiB of nothing
    for name in ("pipe", "loop", "big", "absent", ".", "a\0b"):
        start = time.monotonic()
        with pytest.raises(DataError):
            decode_image(tmp_path/name)
        assert time.monotonic() - start < 1
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(DataError, match="ordinary file"):
            decode_image(device)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_never_escape_as_other_errors(seed):
    draw = np.random.default_rng(seed)
    for content in (PNG, JPG, pil(FACE, "WEBP"), pil(FACE, "TIFF"), pil(FACE, "GIF"), pil(FACE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0")):
        damaged = bytearray(content)
        for at in draw.integers(0, len(damaged), 6):
            damaged[at] = draw.integers(0, 256)
        try:
            out = decode_image(bytes(damaged[:draw.integers(len(damaged)//2, len(damaged) + 1)]), "x")
            assert out.dtype == np.uint8 and out.shape[2] == 3
        except DataError as e:
            assert "x " in str(e)


# --- pickles ------------------------------------------------------------------------------------------------------

MARKER = "hyperface_test_was_attacked"


class Reduce:
    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


class WithState:
    def __setstate__(self, state):
        os.environ[MARKER] = "1"

    def __getstate__(self):
        return {"a": 1}


class Named:
    "Pickles as the module and name that it is given."
    def __init__(self, name):
        self.name = name


def names(*texts):
    "A pickle of protocol 4 that imports module.name through strings."
    body = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in texts)
    return b"\x80\x04" + body + b"\x93."


def persistent():
    buffer = io.BytesIO()

    class P(pickle.Pickler):
        def persistent_id(self, x):
            return "storage://evil" if isinstance(x, Named) else None
    P(buffer, 2).dump(([Named("x")], [True]))
    return buffer.getvalue()


HOSTILE_PICKLES = {
    "os.system": (pickle.dumps(([Reduce(os.system, f"export {MARKER}=1")], [True])), "system"),
    "os.system, protocol 0": (pickle.dumps(([Reduce(os.system, "x")], [True]), 0), "system"),
    "eval": (pickle.dumps(([Reduce(eval, f"__import__('os').environ.__setitem__('{MARKER}', '1')")], [True])), "eval"),
    "exec, protocol 2": (pickle.dumps(([Reduce(exec, "x")], [True]), 2), "exec"),
    "getattr": (pickle.dumps(([Reduce(getattr, "x", "y")], [True])), "getattr"),
    "subprocess": (names("subprocess", "Popen"), "subprocess.Popen"),
    "dotted name": (names("numpy", "os.system"), "numpy.os.system"),
    "allowed module, other name": (names("numpy", "load"), "numpy.load"),
    "numpy.core.multiarray other": (names("numpy._core.multiarray", "fromfile"), "fromfile"),
    "name from the memo": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),
    "build": (pickle.dumps(([WithState()], [True])), "WithState"),
    "inst": (b"(S'x'\nios\nsystem\n.", "os.system"),
    "obj": (b"(cos\nsystem\nS'x'\no.", "os.system"),
    "newobj": (b"\x80\x02cbuiltins\nobject\n)\x81.", "builtins.object"),
    "persistent": (persistent(), "BINPERSID"),
    "persistent, text": (b"Pevil\n.", "persistent object"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "nested": (pickle.dumps(([pickle.dumps(Reduce(os.system, "x")), Reduce(os.system, "x")], [True])), "system"),
    "reduce of a string": (b"\x80\x04\x8c\x01x)R.", "calls something"),
    "build of a list": (b"\x80\x04]}b.", "}|EMPTY_DICT|no place"),
    "build of a number": (b"\x80\x04K\x01K\x02b.", "plain data"),
    "dictionary": (pickle.dumps({"images": []}), "no place|EMPTY_DICT"),
    "set": (pickle.dumps({1, 2}), "no place|EMPTY_SET"),
    "string of 2^63 bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63), "declares"),
    "bytearray of 2^62 bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**62), "declares"),
    "text of 4 GB": (b"\x80\x04X\xff\xff\xff\xff", "declares"),
    "negative length": (b"\x80\x02T\xff\xff\xff\xff", "declares"),
    "number of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f", "a number of"),
    "number of a million digits": (b"L" + b"9"*1_000_000 + b"L\n.", "not \\(list|number"),
    "memo place 2^32": (b"\x80\x02]r\xff\xff\xff\xff.", "not \\(list"),
    "memo never filled": (b"\x80\x02h\x05.", "never filled"),
    "empty stack": (b"\x80\x02.", "stack is empty"),
    "mark missing": (b"\x80\x02e.", "mark is missing"),
    "append to a number": (b"\x80\x02K\x01K\x02a.", "no list"),
    "protocol 77": (b"\x80\x4d.", "protocol 77"),
    "unknown instruction": (b"\x80\x04\xff.", "no place"),
    "no end": (b"\x80\x02]q\x00", "cut off"),
    "only marks": (b"\x80\x02" + b"("*100_000, "cut off"),
    "doubling list": (b"\x80\x02]q\x00" + b"(h\x00h\x00e"*20_000 + b".", "not \\(list"),
    "a picture": (JPG, "no place|cut off"), "text": (b"hello\n", "."), "zip": (b"PK\3\4" + bytes(50), "."),
    "a torch file": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "."),
    "images and labels that do not match": (pickle.dumps(([JPG]*5, [True, False])), "5 images for 2 pairs"),
    "labels of 2 and 3": (pickle.dumps(([JPG]*4, [2, 3])), "neither true nor false"),
    "labels of NaN": (pickle.dumps(([JPG]*2, [float("nan")])), "neither true nor false"),
    "labels are text": (pickle.dumps(([JPG]*2, "yes")), "not a list of labels"),
    "images are numbers": (pickle.dumps(([1, 2], [True])), "pair 0|Images|array"),
    "images are empty": (pickle.dumps(([b"", b""], [True])), "0 and 0 bytes"),
    "three parts": (pickle.dumps(([JPG]*2, [True], 1)), "not \\(list"),
    "float array as image": (pickle.dumps(([np.zeros(4), np.zeros(4)], [True]), 4), "something else than bytes"),
    "object array": (pickle.dumps((np.array([JPG, JPG], object), [True])), "."),
    "itself inside itself": (b"\x80\x02]q\x00h\x00a.", "not \\(list"),
}


@pytest.mark.parametrize("kind", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused_with_the_name_of_what_they_ask_for(kind, tmp_path):
    content, message = HOSTILE_PICKLES[kind]
    path = tmp_path/"lfw.bin"
    path.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for on_error in ("raise", "skip"):
        try:
            r = containers.read_bin(path, on_error)
            assert on_error == "skip" and len(r) == 0 and r.skipped, "accepted"
        except DataError as e:
            import re
            assert "lfw.bin" in str(e) and re.search(message, str(e)), str(e)
    assert MARKER not in os.environ and time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_pickle_that_never_ends_is_stopped(tmp_path):
    path = tmp_path/"x.bin"
    path.write_bytes(b"\x80\x02" + b"N0"*200_000)
    with pytest.raises(DataError, match="more than 1,000 instructions"):
        containers.walk_pickle(path, max_steps=1000)


# --- containers: a base of good files, then damage --------------------------------------------------------------------

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    here = tmp_path_factory.mktemp("good")
    draw = np.random.default_rng(0)
    r = Records.from_arrays(draw.integers(0, 256, (8, 12, 12, 3), dtype=np.uint8), name="good", identity=np.repeat(np.arange(4), 2), image=[f"{i}" for i in range(8)])
    containers.write_rec(r, here/"train", format="png")
    containers.write_lmdb(r, here/"x", format="png")
    containers.write_zip(r, here/"x.zip")
    containers.write_bin(r, [1, 1, 0, 0], here/"x.bin", format="png")
    return dict(records=r, rec=(here/"train.rec").read_bytes(), idx=(here/"train.idx").read_bytes(), lst=(here/"train.lst").read_bytes(), lmdb=(here/"x"/"data.mdb").read_bytes(),
                zip=(here/"x.zip").read_bytes(), bin=(here/"x.bin").read_bytes())


def offsets_of(good):
    return [int(line.split(b"\t")[1]) for line in good["idx"].split(b"\n")[:-1]]


def patched(content, at, new):
    return content[:at] + new + content[at + len(new):]


def nan_label(good):
    return patched(good["rec"], offsets_of(good)[3] + 12, struct.pack("<f", np.nan))


REC_DAMAGE = {
    "cut in a record": (lambda g: dict(rec=g["rec"][:offsets_of(g)[5] + 30]), "cut off|outside"), "cut in a head": (lambda g: dict(rec=g["rec"][:offsets_of(g)[5] + 3]), "outside|cut off"),
    "magic destroyed": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[2], b"XXXX")), "no record begins"), "label NaN": (lambda g: dict(rec=nan_label(g)), "not a number"),
    "label 1.5": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 12, struct.pack("<f", 1.5))), "whole number"),
    "label -1": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 12, struct.pack("<f", -1))), "whole number"),
    "a billion labels": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 8, struct.pack("<I", 2**30))), "more labels than bytes"),
    "length too long": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 4, struct.pack("<I", 2**28))), "cut off"),
    "length too short": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 4, struct.pack("<I", 3))), "too short"),
    "half a billion bytes": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 4, struct.pack("<I", 2**29 - 1)) + bytes(2**20)), "cut off"),
    "a middle part": (lambda g: dict(rec=patched(g["rec"], offsets_of(g)[3] + 7, bytes([0x40]))), "middle part"),
    "index: text": (lambda g: dict(idx=b"not\tan index\n"), "not an index"), "index: negative": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n3\t-")), "outside the file"),
    "index: beyond": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n3\t99999")), "outside the file"), "index: a key twice": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n2\t")), "the key 2 twice"),
    "index: into a record": (lambda g: dict(idx=g["idx"].replace(b"\n3\t%d" % offsets_of(g)[3], b"\n3\t%d" % (offsets_of(g)[3] + 4))), "no record begins"),
    "index: an offset twice": (lambda g: dict(idx=g["idx"].replace(b"\n3\t%d" % offsets_of(g)[3], b"\n3\t%d" % offsets_of(g)[2])), "the offset [0-9]+ twice"),
    "index: 4.7": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n3.7\t")), "not an index"), "index: 1e300": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n3\t1e300")), "not an index"),
    "index: three columns": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n3\t3\t")), "not an index"), "index: empty": (lambda g: dict(idx=b""), "not an index"), "index: 10^30": (lambda g: dict(idx=g["idx"].replace(b"\n3\t", b"\n3\t" + b"9"*30)), "not an index"),
    "record 0 says a million": (lambda g: dict(rec=patched(g["rec"], 32, struct.pack("<f", 1e6))), "record 0"), "record 0 says NaN": (lambda g: dict(rec=patched(g["rec"], 32, struct.pack("<f", np.nan))), "record 0"),
    "list: another label": (lambda g: dict(lst=g["lst"].replace(b"3\t1\t", b"3\t0\t")), "another label"), "list: leads out": (lambda g: dict(lst=g["lst"].replace(b"1/2.png", b"../../2.png")), "leads out"),
    "list: absolute": (lambda g: dict(lst=g["lst"].replace(b"1/2.png", b"/etc/passwd")), "leads out"), "list: a record missing": (lambda g: dict(lst=g["lst"].split(b"\n", 1)[1]), "does not list"),
    "list: binary": (lambda g: dict(lst=bytes(range(256))*4), "key, label, path"), "empty": (lambda g: dict(rec=b""), "empty"), "zeros": (lambda g: dict(rec=bytes(4096)), "no record begins"),
    "no index, garbage at the end": (lambda g: dict(rec=g["rec"] + b"garbage!", idx=None), "no record begins"), "no index, cut": (lambda g: dict(rec=g["rec"][:-5], idx=None), "cut off|bytes and the file|ends before"),
}


def plant_rec(here, good, change):
    for suffix in ("rec", "idx", "lst"):
        content = change(good).get(suffix, good[suffix])
        (here/f"train.{suffix}").unlink(missing_ok=True)
        if content is not None:
            (here/f"train.{suffix}").write_bytes(content)
    return here/"train.rec"


@pytest.mark.parametrize("kind", REC_DAMAGE)
def test_damaged_rec(kind, good, tmp_path):
    change, message = REC_DAMAGE[kind]
    path = plant_rec(tmp_path, good, change)
    with pytest.raises(DataError, match=message) as e:
        containers.read_rec(path)
    assert "train." in str(e.value)
    try:                                                                                   # told to go on: the rest is right, what is left out is listed
        r = containers.read_rec(path, on_error="skip")
    except DataError:
        return                                                                             # nothing can be trusted: no index, or another file's
    assert r.skipped and all(where and why for where, _, why in r.skipped)
    for i in range(len(r)):
        key = int(r.source.payload(i)[8:16][::-1].hex(), 16)
        np.testing.assert_array_equal(r.pixels(i), good["records"].pixels(key - 1))


def zip_of(*entries, labels=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in entries:
            z.writestr(zipfile.ZipInfo(name), content)
        if labels is not None:
            z.writestr("dataset.json", labels if isinstance(labels, (str, bytes)) else json.dumps(dict(labels=labels)))
    return buffer.getvalue()


def overlapping():
    "Two names for the same bytes, as in a zip bomb."
    content = bytearray(zip_of(("a.png", PNG), ("b.png", PNG)))
    second = content.rfind(b"PK\1\2")
    content[second + 42:second + 46] = struct.pack("<I", 0)
    return bytes(content)


def declared(size):
    content = bytearray(zip_of(("a.png", PNG)))
    at = content.rfind(b"PK\1\2")
    content[at + 24:at + 28] = struct.pack("<I", size)
    return bytes(content)


def deflated_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.png", bytes(500_000_000))
    return buffer.getvalue()


BAD_ZIPS = {
    "leads out": (zip_of(("../../x.png", PNG)), "leads out"), "absolute": (zip_of(("/etc/x.png", PNG)), "leads out"), "drive": (zip_of(("C:x.png", PNG)), "leads out"), "backslash": (zip_of(("a\\..\\..\\x.png", PNG)), "leads out"),
    "a name twice": (zip_of(("a.png", PNG), ("a.png", JPG)), "there twice"), "overlap": (overlapping(), "overlaps"), "declares 4 GB": (declared(2**32 - 2), "declared for a picture"), "declares 0": (declared(0), "declared for a picture"),
    "bomb": (deflated_bomb(), "declared for a picture"), "cut": (zip_of(("a.png", PNG))[:-30], "no list of contents"), "no zip": (PNG*40, "no list of contents"), "empty": (b"", "empty"),
    "label missing": (zip_of(("a.png", PNG), ("b.png", PNG), labels=[["a.png", 0]]), "no label"), "label for nothing": (zip_of(("a.png", PNG), labels=[["a.png", 0], ["b.png", 1]]), "not there"),
    "label NaN": (zip_of(("a.png", PNG), labels='{"labels": [["a.png", [NaN, 1.0]]]}'), "not finite"), "label infinite": (zip_of(("a.png", PNG), labels='{"labels": [["a.png", [1e999]]]}'), "not finite"),
    "label negative": (zip_of(("a.png", PNG), labels=[["a.png", -3]]), "whole numbers"), "label text": (zip_of(("a.png", PNG), labels=[["a.png", "who"]]), "whole numbers"), "label true": (zip_of(("a.png", PNG), labels=[["a.png", True]]), "whole numbers"),
    "labels mixed": (zip_of(("a.png", PNG), ("b.png", PNG), labels=[["a.png", 1], ["b.png", [1.0]]]), "whole numbers"), "labels of two lengths": (zip_of(("a.png", PNG), ("b.png", PNG), labels=[["a.png", [1.0, 2]], ["b.png", [1.0]]]), "one length"),
    "label nested": (zip_of(("a.png", PNG), labels=[["a.png", [[1], [2]]]]), "not a vector|not finite|whole numbers"), "label of text in a vector": (zip_of(("a.png", PNG), labels=[["a.png", ["x"]]]), "not a vector"),
    "labels no list": (zip_of(("a.png", PNG), labels='{"labels": 7}'), "not a list"), "labels no JSON": (zip_of(("a.png", PNG), labels="{"), "not a list of labels"), "labels too deep": (zip_of(("a.png", PNG), labels="["*100_000), "not a list of labels"),
    "two labels": (zip_of(("a.png", PNG), labels=[["a.png", 0], ["a.png", 1]]), "two labels"), "labels binary": (zip_of(("a.png", PNG), labels=b"\xff\xfe\0\0"), "not a list of labels"), "label 10^400": (zip_of(("a.png", PNG), labels='{"labels": [["a.png", [1' + "0"*400 + ']]]}'), "not a vector|not finite"),
}


@pytest.mark.parametrize("kind", BAD_ZIPS)
def test_bad_zips(kind, tmp_path):
    content, message = BAD_ZIPS[kind]
    (tmp_path/"x.zip").write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        r = containers.read_zip(tmp_path/"x.zip")
        r.images(size=8)
    assert "x.zip" in str(e.value)


@pytest.mark.parametrize("kind, change, message", [
    ("checksum", lambda c: patched(c, c.find(b"IDAT") + 8, b"\0\1\2"), "checksum"), ("local head", lambda c: patched(c, 0, b"XX"), "no entry"), ("method 99", lambda c: patched(c, c.rfind(b"PK\1\2") + 10, b"\x63\0"), "method 99"),
    ("encrypted", lambda c: patched(c, c.rfind(b"PK\1\2") + 8, b"\1"), "encrypted"), ("contents elsewhere", lambda c: patched(c, c.rfind(b"PK\5\6") + 16, struct.pack("<I", 7)), "damaged|ends before"),
    ("a million entries", lambda c: patched(c, c.rfind(b"PK\5\6") + 10, b"\xff\xff"), "damaged"), ("offset beyond", lambda c: patched(c, c.rfind(b"PK\1\2") + 42, struct.pack("<I", 2**31)), "outside")])
def test_zips_that_are_damaged_inside(kind, change, message, tmp_path):
    (tmp_path/"x.zip").write_bytes(change(zip_of(("a.png", PNG))))
    with pytest.raises(DataError, match=message) as e:
        containers.read_zip(tmp_path/"x.zip").images()
    assert "x.zip" in str(e.value)


def lmdb_of(here, entries, special=None):
    import lmdb
    import msgpack
    keys = [k for k in entries]
    with lmdb.open(str(here/"x"), map_size=1 << 26) as e, e.begin(write=True) as t:
        for k, v in entries.items():
            t.put(k, v)
        for k, v in {b"__keys__": msgpack.packb(keys), b"__len__": msgpack.packb(len(keys)), b"__classnum__": msgpack.packb(3), **(special or {})}.items():
            if v is not None:
                t.put(k, v)
    return here/"x"


def value(content=PNG, label=1):
    import msgpack
    return msgpack.packb((content, label))


BAD_LMDB = {
    "no keys": (lambda: {b"0": value()}, {b"__keys__": None}, "no entry __keys__"), "keys are no msgpack": (lambda: {b"0": value()}, {b"__keys__": b"\xc1"}, "not msgpack"), "keys declare 4 billion": (lambda: {b"0": value()}, {b"__keys__": b"\xdd\xff\xff\xff\xff"}, "not msgpack"),
    "length differs": (lambda: {b"0": value()}, {b"__len__": b"\x05"}, "__len__ says 5"), "key listed, not there": (lambda: {b"0": value()}, {b"__keys__": b"\x91\xc4\1Z"}, "not there"), "listed twice": (lambda: {b"0": value(), b"1": value()}, {b"__keys__": b"\x92\xc4\x010\xc4\x010"}, "twice"),
    "label too large": (lambda: {b"0": value(label=7)}, {}, "label 7"), "label negative": (lambda: {b"0": value(label=-7)}, {}, "label"), "label text": (lambda: {b"0": value(label="who")}, {}, "label"), "label NaN": (lambda: {b"0": value(label=float("nan"))}, {}, "label"),
    "picture is a number": (lambda: {b"0": value(content=5)}, {}, "bytes were expected"), "picture is longer than its entry": (lambda: {b"0": b"\x92\xc6\xff\xff\xff\xff" + PNG}, {}, "in an entry of"), "empty picture": (lambda: {b"0": value(content=b"")}, {}, "0 bytes"),
    "no list": (lambda: {b"0": PNG}, {}, "not a list"), "pickle": (lambda: {b"0": pickle.dumps((PNG, 1))}, {}, "not a list"), "empty value": (lambda: {b"0": b""}, {}, "not a list"), "value cut": (lambda: {b"0": value()[:-5]}, {}, "in an entry of|label"),
}


@pytest.mark.parametrize("kind", BAD_LMDB)
def test_bad_lmdb_entries(kind, tmp_path):
    entries, special, message = BAD_LMDB[kind]
    path = lmdb_of(tmp_path, entries(), special)
    with pytest.raises(DataError, match=message) as e:
        containers.read_lmdb(path)
    assert "data.mdb" in str(e.value)
    if not special:
        r = containers.read_lmdb(path, on_error="skip")
        assert len(r) == 0 and len(r.skipped) == 1


@pytest.mark.parametrize("form", ["rec", "lmdb", "zip", "bin"])
@pytest.mark.parametrize("seed", range(25))
def test_random_damage_gives_records_or_a_data_error(form, seed, good, tmp_path):
    "Cut, flipped and overwritten at random places, with and without skipping: nothing else may come out, and quickly."
    draw = np.random.default_rng(seed)
    content = bytearray(good[form])
    for at in draw.integers(0, len(content), 1 + seed % 8):
        content[at:at + 4] = draw.bytes(4) if seed % 3 else b"\xff\xff\xff\xff"
    if seed % 4 == 0:
        content = content[:draw.integers(1, len(content))]
    path = tmp_path/{"rec": "train.rec", "lmdb": "data.mdb", "zip": "x.zip", "bin": "x.bin"}[form]
    path.write_bytes(content)
    if form == "rec" and seed % 2:
        (tmp_path/"train.idx").write_bytes(good["idx"])
    start = time.monotonic()
    for on_error in ("raise", "skip"):
        try:
            r = formats.read_dataset(path, on_error=on_error, check=True)
            assert len(r) + len(r.skipped) > 0 or form in ("lmdb", "bin", "rec")
            r.images(size=8)
        except HyperfaceError as e:
            assert path.stem in str(e) or "dataset.json" in str(e) or "same image name" in str(e)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("at", [0, 40, 100, 4096, 4096 + 16, 8192, 8192 + 16])
def test_lmdb_pages_full_of_ones(at, good, tmp_path):
    (tmp_path/"data.mdb").write_bytes(patched(good["lmdb"], at, b"\xff"*64))
    try:
        containers.read_lmdb(tmp_path).images()
    except DataError as e:
        assert "data.mdb" in str(e)


def test_a_record_of_endless_parts(tmp_path):
    part = struct.pack("<IfQQ", 0, 1., 0, 0) + bytes(8_000_000)
    content = b"".join(struct.pack("<II", containers.MAGIC, kind << 29 | len(part)) + part for kind in [1] + [2]*9)
    (tmp_path/"x.rec").write_bytes(content)
    (tmp_path/"x.idx").write_text("0\t0\n")
    with pytest.raises(DataError, match=r"x\.rec .*more than 67,108,864 bytes"):
        containers.read_rec(tmp_path/"x.rec").images()


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    import warnings
    from concurrent.futures import ThreadPoolExecutor
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_image, [PNG]*200))
    assert warnings.filters == before


def test_lmdb_that_points_into_itself(good, tmp_path):
    "A branch page whose child is itself must not loop."
    content = bytearray(good["lmdb"])
    size, pages, root = containers._lmdb_root(containers.OpenFile(_written(tmp_path/"a.mdb", content)))
    page = struct.pack("<QHHHH", root, 0, 1, 20, size - 8) + struct.pack("<HH", size - 8, size - 8)
    node = struct.pack("<HHHH", root & 0xffff, 0, 0, 0)
    content[root*size:(root + 1)*size] = page + bytes(size - len(page) - 8) + node
    with pytest.raises(DataError, match="reached twice"):
        containers.read_lmdb(_written(tmp_path/"data.mdb", content))


def _written(path, content):
    path.write_bytes(content)
    return path


# --- folders ---------------------------------------------------------------------------------------------------------

def test_links_out_of_the_folder_and_odd_names(tmp_path):
    secret = tmp_path/"secret.jpg"
    secret.write_bytes(JPG)
    root = tmp_path/"set"
    (root/"a").mkdir(parents=True)
    (root/"a"/"1.jpg").write_bytes(JPG)
    (root/"a"/"new\nline.jpg").write_bytes(JPG)
    (root/"a"/"é€𝕏.jpg").write_bytes(JPG)
    (root/"a"/"2.jpg").symlink_to(secret)
    (root/"b").symlink_to(tmp_path)
    (root/"loop").symlink_to(root)
    with pytest.raises(DataError, match="leads out"):
        formats.read_folder(root)
    r = formats.read_folder(root, on_error="skip")
    assert sorted(set(Path(n).name for n in r.table.image)) == ["1.jpg", "new\nline.jpg", "é€𝕏.jpg"]
    assert any("leads out" in why for _, _, why in r.skipped) and not any("secret" in n for n in r.table.image)


def test_a_name_that_is_not_text(tmp_path):
    (tmp_path/"a").mkdir()
    with open(os.path.join(os.fsencode(tmp_path), b"a", b"bad\xff.jpg"), "wb") as f:
        f.write(JPG)
    (tmp_path/"a"/"good.jpg").write_bytes(JPG)
    with pytest.raises(DataError, match="not UTF-8"):
        formats.read_folder(tmp_path)
    assert len(formats.read_folder(tmp_path, on_error="skip")) == 1


def test_a_table_from_elsewhere_cannot_read_other_files(tmp_path):
    import pandas as pd
    (tmp_path/"secret.png").write_bytes(PNG)
    (tmp_path/"set").mkdir()
    for name in ("../secret.png", str(tmp_path/"secret.png"), "a/../../secret.png"):
        pd.DataFrame(dict(image=[name], identity=["x"])).to_parquet(tmp_path/"set"/"records.parquet")
        with pytest.raises(DataError, match="leads out"):
            Records.load(tmp_path/"set").images()
    (tmp_path/"set"/"link.png").symlink_to(tmp_path/"secret.png")
    pd.DataFrame(dict(image=["link.png"], identity=["x"])).to_parquet(tmp_path/"set"/"records.parquet")
    with pytest.raises(DataError, match="leads out"):
        Records.load(tmp_path/"set").images()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(1000) + b"PAR1", b"no parquet"])
def test_damaged_records_parquet(content, tmp_path):
    (tmp_path/"records.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"records\.parquet"):
        Records.load(tmp_path)


def test_a_table_whose_text_is_no_text(tmp_path):
    path = Records.from_arrays(np.zeros((2, 4, 4, 3), np.uint8), image=["abcdef", "ghijkl"]).save(tmp_path/"s")/"records.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq
    bad = pa.Array.from_buffers(pa.large_string(), 1, [None, pa.py_buffer(np.array([0, 3], np.int64).tobytes()), pa.py_buffer(b"\xff\xfe\x01")])
    pq.write_table(pa.table(dict(image=bad, identity=["x"])), path)
    with pytest.raises(DataError, match=r"records\.parquet"):
        Records.load(path.parent).images()


def test_damaged_images_in_a_folder_are_reported(tmp_path):
    for k, content in enumerate([JPG, b"", JPG[:100], b"<html>", PNG]):
        (tmp_path/"p").mkdir(exist_ok=True)
        (tmp_path/"p"/f"{k}.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.jpg"):
        formats.read_dataset(tmp_path, check=True)
    r = formats.read_dataset(tmp_path, on_error="skip", check=True)
    assert list(r.table.image) == ["p/0.jpg", "p/4.jpg"] and len(r.skipped) == 3


# --- lists of pairs ------------------------------------------------------------------------------------------------

BAD_PAIRS = {
    "empty": b"", "no header": b"Abel\t1\t2\n", "header 0": b"0\n", "header negative": b"-1\nA\t1\t2\nA\t1\tB\t1\n", "header huge": b"99999999999999999999\n", "cut": b"1\t2\nA\t1\t2\n", "leads out": b"1\n../../etc/passwd\t1\t2\nA\t1\tB\t1\n",
    "four columns where three": b"1\nA\t1\tB\t1\nA\t1\t2\n", "index 0": b"1\nA\t0\t1\nA\t1\tB\t1\n", "index text": b"1\nA\tx\t1\nA\t1\tB\t1\n", "an image with itself": b"1\nA\t1\t1\nA\t1\tB\t1\n", "impostor of one person": b"1\nA\t1\t2\nA\t1\tA\t2\n",
    "missing image": b"1\nA\t1\t9\nA\t1\tB\t1\n", "binary": bytes(range(256)), "10^30": b"1\nA\t1\t" + b"9"*30 + b"\nA\t1\tB\t1\n",
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_bad_pairs_files(kind, tmp_path):
    r = Records.from_arrays(np.zeros((3, 4, 4, 3), np.uint8), image=["A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg"], identity=["A", "A", "B"])
    (tmp_path/"pairs.txt").write_bytes(BAD_PAIRS[kind])
    for read in (pairs.read_lfw_pairs, pairs.read_pairs):
        with pytest.raises(DataError, match=r"pairs\.txt"):
            read(tmp_path/"pairs.txt", r)


def test_there_are_enough_hostile_inputs():
    assert sum(map(len, (BAD_PICTURES, HOSTILE_PICKLES, REC_DAMAGE, BAD_ZIPS, BAD_LMDB, BAD_PAIRS))) >= 150

"""Downloads against a server on 127.0.0.1 that cuts, lies, stalls and redirects; archives that want out of their folder."""
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest

from hyperface.core import ConfigError, DataError, MissingWeights
from hyperface.data import fetch as F

PAYLOAD = np.random.default_rng(0).bytes(1_000_000)
SUM = hashlib.sha256(PAYLOAD).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def do_GET(self):
        s, name = self.server, self.path.lstrip("/")
        asked = self.headers.get("Range")
        s.log.append((name, asked, self.headers.get("If-Range")))
        if s.answers:
            code = s.answers.pop(0)
            if code:
                return self.send_error(code)
        if name in s.redirects:
            self.send_response(302)
            self.send_header("Location", s.redirects[name])
            return self.end_headers()
        if name not in s.files:
            return self.send_error(404)
        content, start, tag = s.files[name], 0, s.tag
        if asked and not s.ignore_range and (not self.headers.get("If-Range") or self.headers.get("If-Range") == tag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + s.lie}-{len(content) - 1}/{len(content)}")
        if tag:
            self.send_header("ETag", tag)
        if not s.no_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if s.cut is None else min(len(content), start + s.cut)
        try:
            self.wfile.write(content[start:end])
            if s.stall:
                time.sleep(s.stall)
            while s.endless:
                self.wfile.write(bytes(65536))
        except OSError:
            pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    s.daemon_threads = True
    s.files, s.redirects, s.log, s.answers = {"f.bin": PAYLOAD}, {}, [], []
    s.cut, s.ignore_range, s.tag, s.lie, s.no_length, s.stall, s.endless = None, False, '"v1"', 0, False, 0, False
    s.at = f"http://127.0.0.1:{s.server_port}/"
    threading.Thread(target=s.serve_forever, daemon=True, kwargs=dict(poll_interval=.01)).start()
    yield s
    s.endless = False
    s.shutdown()
    s.server_close()


def get(server, path, check=SUM, name="f.bin", **options):
    return F.download(server.at + name, path, check, **{"tries": 3, "wait": .001, **options})


def test_whole_file_and_nothing_else(server, tmp_path):
    assert get(server, tmp_path/"d"/"f.bin") == SUM
    assert (tmp_path/"d"/"f.bin").read_bytes() == PAYLOAD and [p.name for p in (tmp_path/"d").iterdir()] == ["f.bin"]
    get(server, tmp_path/"d"/"f.bin")
    assert len(server.log) == 1                                             # the second time nothing is asked for


def test_interrupted_then_resumed_in_a_later_run(server, tmp_path):
    server.cut = 300_000
    with pytest.raises(DataError, match="300,000 of 1,000,000"):
        get(server, tmp_path/"f.bin", tries=1)
    assert not (tmp_path/"f.bin").exists() and (tmp_path/"f.bin.part").stat().st_size == 300_000
    server.cut = None
    assert get(server, tmp_path/"f.bin") == SUM
    assert server.log[-1][1:] == ("bytes=300000-", '"v1"')
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_killed_in_the_middle_then_resumed(server, tmp_path):
    "SIGKILL while bytes arrive; the next run takes up what is there."
    server.cut, server.stall = 400_000, 20
    code = f"from hyperface.data.fetch import download; download({server.at + 'f.bin'!r}, {str(tmp_path/'f.bin')!r}, {SUM!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, "HYPERFACE_PROGRESS": "0"})
    deadline = time.monotonic() + 30
    while not ((tmp_path/"f.bin.part").exists() and (tmp_path/"f.bin.part").stat().st_size >= 250_000) and time.monotonic() < deadline:
        time.sleep(.02)
    child.kill()
    child.wait()
    kept = (tmp_path/"f.bin.part").stat().st_size
    assert kept >= 250_000 and not (tmp_path/"f.bin").exists()
    server.cut, server.stall = None, 0
    assert get(server, tmp_path/"f.bin") == SUM and server.log[-1][1] == f"bytes={kept}-"


def test_many_cuts_in_one_call(server, tmp_path):
    server.cut = 260_000
    assert get(server, tmp_path/"f.bin", tries=4) == SUM
    assert [r for _, r, _ in server.log] == [None, "bytes=260000-", "bytes=520000-", "bytes=780000-"]


def test_server_that_ignores_range_starts_over(server, tmp_path):
    (tmp_path/"f.bin.part").write_bytes(PAYLOAD[:1000])
    server.ignore_range = True
    assert get(server, tmp_path/"f.bin") == SUM and (tmp_path/"f.bin").stat().st_size == 1_000_000


def test_file_changed_between_two_tries_is_not_spliced(server, tmp_path):
    server.cut = 300_000
    with pytest.raises(DataError):
        get(server, tmp_path/"f.bin", None, tries=1)
    server.cut, server.tag, server.files["f.bin"] = None, '"v2"', PAYLOAD[::-1]
    get(server, tmp_path/"f.bin", None)
    assert (tmp_path/"f.bin").read_bytes() == PAYLOAD[::-1]


def test_server_that_sends_another_part(server, tmp_path):
    (tmp_path/"f.bin.part").write_bytes(PAYLOAD[:1000])
    server.lie = 5
    with pytest.raises(DataError, match="another part"):
        get(server, tmp_path/"f.bin")


@pytest.mark.parametrize("size", [1_000_000, 1_000_500])
def test_leftover_as_long_as_the_file_or_longer(server, tmp_path, size):
    (tmp_path/"f.bin.part").write_bytes((PAYLOAD + bytes(500))[:size])
    assert get(server, tmp_path/"f.bin") == SUM


def test_wrong_checksum_is_deleted_and_told(server, tmp_path):
    with pytest.raises(DataError, match=f"SHA-256 {SUM} instead of {'0'*64}"):
        get(server, tmp_path/"f.bin", "0"*64)
    assert list(tmp_path.iterdir()) == []


def test_damaged_leftover_costs_one_more_run_only(server, tmp_path):
    (tmp_path/"f.bin.part").write_bytes(b"x"*1000)
    with pytest.raises(DataError, match="is not the file"):
        get(server, tmp_path/"f.bin")
    assert get(server, tmp_path/"f.bin") == SUM


@pytest.mark.parametrize("code, tries, asked", [(404, 3, 1), (403, 3, 1), (503, 3, 3)])
def test_answers_that_are_errors(server, tmp_path, code, tries, asked):
    server.answers = [code]*9
    with pytest.raises(DataError, match=str(code)):
        get(server, tmp_path/"f.bin", tries=tries)
    assert len(server.log) == asked and not (tmp_path/"f.bin").exists()


def test_a_passing_failure_is_waited_out(server, tmp_path):
    server.answers = [503, 500, None]
    assert get(server, tmp_path/"f.bin") == SUM


def test_the_second_address_is_tried(server, tmp_path):
    assert F.download([server.at + "gone.bin", server.at + "f.bin"], tmp_path/"f.bin", SUM, tries=2, wait=.001) == SUM


def test_redirects(server, tmp_path):
    server.redirects = {"a": "/b", "b": "/f.bin", "loop": "/loop", "out": "file:///etc/passwd"}
    assert get(server, tmp_path/"f.bin", name="a") == SUM
    for name in ("loop", "out"):
        with pytest.raises(DataError):
            get(server, tmp_path/name, name=name)
        assert not (tmp_path/name).exists()


def test_no_length_announced(server, tmp_path):
    server.no_length = True
    assert get(server, tmp_path/"f.bin") == SUM


def test_a_server_that_never_stops(server, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "MAX_DOWNLOAD", 3_000_000)
    server.endless = server.no_length = True
    with pytest.raises(DataError, match="more than 3,000,000"):
        get(server, tmp_path/"f.bin")


def test_a_server_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(F, "TIMEOUT", .2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        start = time.monotonic()
        with pytest.raises(DataError, match="timed out"):
            F.download(f"http://127.0.0.1:{s.getsockname()[1]}/x", tmp_path/"x", SUM, tries=2, wait=.001)
        assert time.monotonic() - start < 5


def test_a_server_that_speaks_another_language(tmp_path):
    def babble():
        with contextless.accept()[0] as c:
            c.recv(1000)
            c.sendall(b"220 ftp ready\r\n")
    contextless = socket.socket()
    contextless.bind(("127.0.0.1", 0))
    contextless.listen()
    t = threading.Thread(target=babble, daemon=True)
    t.start()
    with pytest.raises(DataError, match="cannot be fetched"):
        F.download(f"http://127.0.0.1:{contextless.getsockname()[1]}/x", tmp_path/"x", SUM, tries=1)
    contextless.close()


def test_offline_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="fetch it elsewhere and put it at .*x"):
        F.download("http://127.0.0.1:9/x", tmp_path/"x", SUM, tries=2, wait=.001)
    with pytest.raises(DataError, match="fetch it elsewhere"):
        F.download("http://nowhere.invalid/x", tmp_path/"x", SUM, tries=1)
    assert list(tmp_path.iterdir()) == []


def test_disk_full_before_and_during(server, tmp_path, monkeypatch):
    monkeypatch.setattr(F.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match="No space for f.bin: 1 MB are to come"):
        get(server, tmp_path/"f.bin")
    monkeypatch.undo()
    real = F._attempt

    def full(url, f, part):
        f.write(PAYLOAD[:1234])
        f.flush()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(F, "_attempt", full)
    with pytest.raises(DataError, match="No space left .* what has arrived is kept"):
        F.download([server.at + "f.bin", server.at + "f.bin"], tmp_path/"f.bin", SUM)
    monkeypatch.setattr(F, "_attempt", real)
    assert (tmp_path/"f.bin.part").stat().st_size == 1234
    assert get(server, tmp_path/"f.bin") == SUM and server.log[-1][1] == "bytes=1234-"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_really_full_disk(server, tmp_path):
    (tmp_path/"f.bin.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left"):
        get(server, tmp_path/"f.bin")


def test_two_processes_do_not_write_one_part(server, tmp_path):
    server.cut, server.stall = 500_000, 1.5
    errors = []

    def first():
        try:
            get(server, tmp_path/"f.bin", tries=2)
        except DataError as e:
            errors.append(e)
    t = threading.Thread(target=first)
    t.start()
    while not ((tmp_path/"f.bin.part").exists() and (tmp_path/"f.bin.part").stat().st_size):
        time.sleep(.01)
    with pytest.raises(DataError, match="another process"):
        get(server, tmp_path/"f.bin")
    server.cut, server.stall = None, 0
    t.join()
    assert not errors and (tmp_path/"f.bin").read_bytes() == PAYLOAD


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "x", "javascript:1"])
def test_other_kinds_of_address(url, tmp_path):
    with pytest.raises(ConfigError, match="http"):
        F.download(url, tmp_path/"x")


def test_a_checksum_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        F.download("http://x/y", tmp_path/"x", "abc")


# --- archives -----------------------------------------------------------------------------------------------------

def tar_of(*members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as t:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
            else:
                info.size = len(content)
            t.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def zip_of(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content, *mode in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (mode[0] if mode else 0o100644) << 16
            z.writestr(info, content)
    return buffer.getvalue()


R = tarfile.REGTYPE
HOSTILE_ARCHIVES = {
    "zip leads out": (zip_of(("../../x", b"x")), "leads out"), "zip absolute": (zip_of(("/tmp/x", b"x")), "leads out"), "zip backslash": (zip_of(("a\\..\\..\\x", b"x")), "leads out"), "zip link": (zip_of(("a", b"/etc/passwd", 0o120777)), "link"),
    "zip bomb": (zip_of(("a", bytes(30_000_000))), "bomb"), "zip cut": (zip_of(("a", b"x"*100))[:-40], "cannot be unpacked"), "zip damaged": (zip_of(("a", os.urandom(1000))).replace(b"PK\1\2", b"PK\1\3"), "cannot be unpacked"),
    "tar leads out": (tar_of(("../../x", b"x", R)), "leads out"), "tar absolute": (tar_of(("/tmp/x", b"x", R)), "leads out"), "tar link": (tar_of(("a", "/etc/passwd", tarfile.SYMTYPE)), "link"), "tar hard link": (tar_of(("a", "/etc/passwd", tarfile.LNKTYPE)), "link"),
    "tar device": (tar_of(("a", b"", tarfile.CHRTYPE)), "link or device"), "tar pipe": (tar_of(("a", b"", tarfile.FIFOTYPE)), "link or device"), "tar bomb": (tar_of(("a", bytes(30_000_000), R)), "bomb"), "tar cut": (tar_of(("a", os.urandom(5000), R))[:2000], "cannot be unpacked"),
    "web page": (b"<html>please log in</html>", "cannot be unpacked"), "empty": (b"", "cannot be unpacked"),
}


@pytest.mark.parametrize("kind", HOSTILE_ARCHIVES)
def test_hostile_archives(kind, tmp_path):
    content, message = HOSTILE_ARCHIVES[kind]
    (tmp_path/"in").mkdir()
    (tmp_path/"in"/"a.zip").write_bytes(content)
    (tmp_path/"in"/"out").mkdir()
    (tmp_path/"in"/"out"/"old").write_text("kept")
    with pytest.raises(DataError, match=message):
        F.unpack(tmp_path/"in"/"a.zip", tmp_path/"in"/"out", max_bytes=20_000_000)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["in", "in/a.zip", "in/out", "in/out/old"]


def test_what_is_there_already_is_never_deleted(server, tmp_path):
    mine = tmp_path/"models"/"buffalo_s"/"mine.onnx"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"my own")
    server.files["buffalo_s.zip"] = zip_of(("det.onnx", b"one"))
    F.fetch("buffalo_s", tmp_path, base_url=server.at, say=lambda t: None)
    (tmp_path/"x.zip").write_bytes(server.files["buffalo_s.zip"])
    with pytest.raises(DataError, match="is there already"):
        F.unpack(tmp_path/"x.zip", mine.parent)
    assert mine.read_bytes() == b"my own" and not server.log


def test_empty_archive_and_folder_as_target(server, tmp_path):
    (tmp_path/"x.zip").write_bytes(zip_of())
    with pytest.raises(DataError, match="empty"):
        F.unpack(tmp_path/"x.zip", tmp_path/"out")
    with pytest.raises(DataError, match="is a folder"):
        get(server, tmp_path)


@pytest.mark.parametrize("make", [lambda: zip_of(("top/a/1.jpg", b"1"), ("top/b/2.jpg", b"2")), lambda: tar_of(("top/a/1.jpg", b"1", R), ("top/b/2.jpg", b"2", R))])
def test_good_archives(make, tmp_path):
    (tmp_path/"x").write_bytes(make())
    F.unpack(tmp_path/"x", tmp_path/"out")
    assert sorted(str(p.relative_to(tmp_path/"out")) for p in (tmp_path/"out").rglob("*.jpg")) == ["a/1.jpg", "b/2.jpg"]


# --- by name ---------------------------------------------------------------------------------------------------------

def test_lfw_addresses_and_checksums_are_those_of_scikit_learn():
    from sklearn.datasets import _lfw
    pinned = {f.filename: (f.url, f.checksum) for f in (_lfw.ARCHIVE, _lfw.FUNNELED_ARCHIVE, *_lfw.TARGETS)}
    ours = {f.name: (f.urls[0], f.sha256) for name in ("lfw", "lfw-funneled") for f in F.OFFERS[name].files}
    assert ours == pinned


def test_pairs_files_here_have_the_pinned_checksums():
    from hyperface.core import data_dir, file_key
    if data_dir("lfw") is None:
        pytest.skip("HYPERFACE_DATA names no folder with lfw")
    pinned = {f.name: f.sha256 for f in F.OFFERS["lfw"].files}
    for name in ("pairs.txt", "pairsDevTrain.txt"):
        assert file_key(data_dir("lfw")/name) == pinned[name]


def test_every_offer_has_terms_and_an_address_or_an_authority():
    for offer in F.OFFERS.values():
        assert offer.licence and (offer.files or offer.ask)
        for file in offer.files:
            assert all(u.startswith("https://") for u in file.urls) and (file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256))
    assert len(F.available()) == len(F.OFFERS)


@pytest.fixture
def toy_lfw(server, monkeypatch):
    "LFW's offer with toy contents, and checksums to match."
    contents = {"pairs.txt": b"1\t1\nA\t1\t2\nA\t1\tB\t1\n", "pairsDevTrain.txt": b"1\n", "pairsDevTest.txt": b"1\n", "lfw.tgz": tar_of(("lfw/A/A_0001.jpg", b"jpeg", R), ("lfw/A/A_0002.jpg", b"jpeg", R), ("lfw/B/B_0001.jpg", b"jpeg", R))}
    server.files |= contents
    files = tuple(F.Remote(f.name, f.urls, hashlib.sha256(contents[f.name]).hexdigest(), f.unpack) for f in F.OFFERS["lfw"].files)
    monkeypatch.setitem(F.OFFERS, "lfw", F.Offer("lfw", "toy", "toy terms", files))
    return server


def test_fetch_lfw_is_readable_at_once(toy_lfw, tmp_path):
    from hyperface.data.formats import read_dataset
    from hyperface.data.pairs import read_pairs
    told = []
    folder = F.fetch("lfw", tmp_path/"lfw", base_url=toy_lfw.at, wait=.001, say=told.append)
    assert told[0].startswith("lfw: toy\nTerms: toy terms") and not toy_lfw.log[0][1]
    assert sorted(p.name for p in folder.iterdir()) == [".fetched.json", "lfw", "pairs.txt", "pairsDevTest.txt", "pairsDevTrain.txt"]
    r = read_dataset(folder)
    assert r.format == "lfw" and len(r) == 3 and len(read_pairs(folder/"pairs.txt", r)) == 2
    n = len(toy_lfw.log)
    F.fetch("lfw", folder, base_url=toy_lfw.at, say=told.append)
    assert len(toy_lfw.log) == n                                            # nothing is fetched twice
    (folder/"pairs.txt").write_text("edited")
    F.fetch("lfw", folder, base_url=toy_lfw.at, say=told.append)            # what is no longer right is fetched again
    assert (folder/"pairs.txt").read_bytes().startswith(b"1\t1\n") and len(toy_lfw.log) == n + 1


def test_terms_are_told_before_anything_is_asked_for(server, tmp_path):
    seen = []
    with pytest.raises(DataError):
        F.fetch("buffalo_l", tmp_path, base_url=server.at, tries=1, say=lambda text: seen.append((text, len(server.log))))
    assert "non-commercial" in seen[0][0] and seen[0][1] == 0


def test_trust_on_first_use(server, tmp_path):
    server.files["buffalo_s.zip"] = zip_of(("det.onnx", b"one"))
    told = []
    F.fetch("buffalo_s", tmp_path, base_url=server.at, say=told.append)
    first = hashlib.sha256(server.files["buffalo_s.zip"]).hexdigest()
    assert any("first use" in t and first in t for t in told)
    assert json.loads((tmp_path/".fetched.json").read_text())["buffalo_s.zip"]["sha256"] == first
    shutil.rmtree(tmp_path/"models")
    server.files["buffalo_s.zip"] = zip_of(("det.onnx", b"another"))
    with pytest.raises(DataError, match="is not the file"):
        F.fetch("buffalo_s", tmp_path, base_url=server.at, say=told.append)
    assert not (tmp_path/"models"/"buffalo_s").exists()


def test_a_login_page_is_not_trusted(server, tmp_path):
    "What cannot be unpacked is neither written down nor kept, so that the next try starts afresh."
    server.files["buffalo_s.zip"] = b"<html>please log in</html>"
    with pytest.raises(DataError, match="cannot be unpacked"):
        F.fetch("buffalo_s", tmp_path, base_url=server.at, say=lambda t: None)
    server.files["buffalo_s.zip"] = zip_of(("det.onnx", b"one"))
    F.fetch("buffalo_s", tmp_path, base_url=server.at, say=lambda t: None)
    assert (tmp_path/"models"/"buffalo_s"/"det.onnx").read_bytes() == b"one"


def test_what_cannot_be_fetched_says_where_to_ask(tmp_path):
    for name in ("utkface", "digiface", "bupt"):
        with pytest.raises(MissingWeights, match="https?://"):
            F.fetch(name, tmp_path/name, say=lambda t: None)
        assert not (tmp_path/name).exists()
    with pytest.raises(ConfigError, match="There are: lfw"):
        F.fetch("lfww", tmp_path)
    (tmp_path/"file").touch()
    with pytest.raises(DataError, match="is a file"):
        F.fetch("lfw", tmp_path/"file", say=lambda t: None)

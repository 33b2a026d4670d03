"""Inspecting a data set: planted faults are found and named, the page is safe and whole, nothing half-written."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hyperface.core import ConfigError, DataError, read_json
from hyperface.data.images import encode_image
from hyperface.data.records import Records
from hyperface.extraction.embed import Embeddings
from hyperface.metrics.quality import intra_class_noise, noise_report, plant_faults, precision_recall_of
from hyperface.report import inspection
from hyperface.report.inspection import Rules, group_shares, inspect_dataset, leak_threshold, measure_faults, open_subject, read_attributes

PEOPLE, EACH, DIM = 60, 8, 256


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def people(n=PEOPLE, each=EACH, sigma=.7, seed=0):
    "Directions of n people, and pictures round them: genuine pairs have a cosine near 1 / (1 + sigma^2)."
    gen = np.random.default_rng(seed)
    centre = unit(gen.standard_normal((n, DIM)))
    return centre, unit(np.repeat(centre, each, 0) + sigma / np.sqrt(DIM) * gen.standard_normal((n * each, DIM))).astype(np.float32), np.repeat([f"p{i:03d}" for i in range(n)], each)


def blank(labels, name="set", **columns):
    "Records with pictures that can be told apart by their grey value."
    grey = (np.arange(len(labels)) % 200 + 20).astype(np.uint8)
    return Records.from_arrays(np.broadcast_to(grey[:, None, None, None], (len(labels), 16, 16, 3)).copy(), name, identity=list(labels), **columns)


@pytest.fixture(scope="module")
def planted():
    centre, x, who = people()
    vectors, labels, truth = plant_faults(x, who, wrong_folder=20, split=6, copies=15, seed=1)
    gen = np.random.default_rng(7)
    strangers = unit(gen.standard_normal((400, DIM)))
    known = unit(centre[:5] + .7 / np.sqrt(DIM) * gen.standard_normal((5, DIM)))       # other pictures of five people
    training = np.concatenate([strangers, known])
    sources = [a for a, _ in sorted(truth["copies"], key=lambda p: p[1])]
    return dict(vectors=vectors, labels=labels, truth=truth, person=np.r_[who, who[sources]], training=training, names=[f"s{i // 2}" for i in range(400)] + [f"p{i:03d}" for i in range(5)])


@pytest.fixture(scope="module")
def report(planted, tmp_path_factory):
    p = planted
    return inspect_dataset(blank(p["labels"], gender=np.where(np.arange(len(p["labels"])) % 4 == 0, "female", "male"), age=np.arange(len(p["labels"])) % 70 + 5.), tmp_path_factory.mktemp("report") / "out",
                           embeddings=Embeddings(p["vectors"]), train=blank(p["names"], "training"), train_embeddings=Embeddings(p["training"]), estimate=False)


def pairs(frame, a, b):
    return [tuple(sorted(p)) for p in zip(frame[a], frame[b])]


def kind(report, name):
    return report.findings[report.findings.kind == name]


def test_every_planted_fault_is_found_and_named(report, planted):
    truth, wrong = planted["truth"], kind(report, "wrong_folder")
    assert precision_recall_of(wrong.row, truth["wrong_folder"]) == (1, 1)
    assert (wrong.other_identity.str.replace(" (2)", "", regex=False) == planted["person"][wrong.row]).all()           # the suggestion is where it came from
    assert (wrong.identity.to_numpy() == planted["labels"][wrong.row]).all()
    assert precision_recall_of(pairs(kind(report, "split"), "identity", "other_identity"), truth["split"]) == (1, 1)
    assert precision_recall_of(pairs(kind(report, "duplicate"), "row", "other_row"), truth["copies"]) == (1, 1)
    leaked = planted["person"] < "p005"
    declared = np.isin(np.arange(len(leaked)), kind(report, "leak").row)
    assert declared[leaked].all() and declared[~leaked].mean() < .05                   # 1 % expected; pictures of one person come together
    leak = kind(report, "leak")
    assert (leak.other_identity[leak.row.isin(np.flatnonzero(planted["person"] < "p005"))].to_numpy() < "p005").all()


def test_findings_say_what_is_in_the_table(report, planted):
    names = report.subject.records.table["image"].astype(str).to_numpy()
    own = report.findings[report.findings.kind.isin(["wrong_folder", "duplicate", "split"])]
    assert (names[own.row] == own.image).all() and (names[own.other_row] == own.other_image).all()
    worst = kind(report, "wrong_folder").cosine.to_numpy()
    assert (np.diff(worst) >= 0).all() and (worst < .3).all()
    x, labels = planted["vectors"].astype(float), planted["labels"]
    i = int(kind(report, "wrong_folder").row.iloc[0])
    rest = [j for j in np.flatnonzero(labels == labels[i]) if j != i and j not in planted["truth"]["wrong_folder"]]
    assert worst[0] == pytest.approx(x[i] @ unit(x[rest].sum(0)), abs=1e-5)


def test_a_common_direction_is_removed_and_both_numbers_are_told(planted):
    gen = np.random.default_rng(3)
    common = unit(gen.standard_normal(DIM))
    shifted = unit(planted["vectors"] + 1. * common).astype(np.float32)                   # strangers at a cosine near .5
    records = blank(planted["labels"])
    plain = inspect_dataset(records, embeddings=Embeddings(shifted), rules=Rules(centre=False), estimate=False)
    default = inspect_dataset(records, embeddings=Embeddings(shifted), estimate=False)
    truth = planted["truth"]
    assert default.faults.mean is not None and plain.faults.mean is None
    assert precision_recall_of(kind(default, "wrong_folder").row, truth["wrong_folder"]) == (1, 1)
    assert precision_recall_of(kind(plain, "wrong_folder").row, truth["wrong_folder"])[1] < .2
    m = default.measures.set_index("measure")
    by_rule = noise_report(shifted, planted["labels"])
    assert m.as_embedded["intra_class_noise_rate"] == by_rule["intra_class_noise_rate"] and m.as_embedded["inter_class_noise_rate"] == by_rule["inter_class_noise_rate"]
    assert m.as_embedded["impostor_mean"] > .3 and abs(m.value["impostor_mean"]) < .03
    assert "as embedded" in inspection.page_of(default) and "as embedded" not in inspection.page_of(plain)


def test_vectors_stay_as_they_are_where_strangers_are_strangers_or_all_is_one(planted):
    assert measure_faults(open_subject(blank(planted["labels"]), embeddings=Embeddings(planted["vectors"]))).mean is None
    one = np.repeat(unit(np.ones((1, DIM))), 40, 0).astype(np.float32)
    same = inspect_dataset(blank([f"q{i // 2}" for i in range(40)]), embeddings=Embeddings(one), estimate=False)
    assert same.faults.mean is None and same.counts["duplicate"] == 40 * 39 // 2


def test_leak_threshold_is_what_strangers_reach():
    "Strangers with a heavy tail: families of three people who look alike."
    gen = np.random.default_rng(0)
    family = np.repeat(gen.standard_normal((100, DIM)), 3, 0) * gen.random((300, 1)) + gen.standard_normal((300, DIM))
    y, who = unit(np.repeat(family, 3, 0) + .5 * gen.standard_normal((900, DIM))).astype(np.float32), np.repeat(np.arange(300), 3).astype(str)
    expected = np.quantile(np.where(who[:, None] == who[None], -1, y @ y.T).max(1), .95)
    assert leak_threshold(y, who, .05) == pytest.approx(expected, abs=1e-6)
    drawn = leak_threshold(y, who, .05, sample=300)
    assert abs(drawn - expected) < .1 and drawn == leak_threshold(y, who, .05, sample=300)
    assert leak_threshold(y, [None] * len(y)) is None
    with pytest.raises(ConfigError, match="chance"): leak_threshold(y, who, 0)


def test_json_has_every_number_with_its_n(report, planted):
    text = (report.page.parent / "inspect.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    d = json.loads(text)
    assert all({"value", "n", "meaning"} <= set(m) and m["n"] >= 0 for m in d["measures"])
    value = {m["measure"]: m for m in d["measures"]}
    n, labels = len(planted["labels"]), planted["labels"]
    genuine = int((pd.Series(labels).value_counts() * (pd.Series(labels).value_counts() - 1) // 2).sum())
    assert value["genuine_mean"]["n"] == genuine == sum(d["histograms"]["genuine"]) and value["eer_rate"]["n"] == n * (n - 1) // 2
    assert sum(d["histograms"]["impostor"]) == n * (n - 1) // 2 - genuine
    assert sum(d["histograms"]["picture_to_identity"]) == n and len(d["histograms"]["edges"]) == 201
    c = len(set(labels))
    assert sum(d["histograms"]["identity_to_identity"]) == c * (c - 1) // 2 and value["uniqueness_rate"]["n"] == c
    assert d["rules"]["same_person"] == .7 and d["embedder"] == dict(name="unknown", key=None) and d["provenance"]["versions"]["hyperface"]
    assert d["findings"]["wrong_folder"] == 20 and d["rates"]["wrong_folder"] == pytest.approx(20 / n)
    assert value["intra_class_noise_rate"]["value"] == pytest.approx(intra_class_noise(planted["vectors"], labels).attrs["rate"])
    table = pd.read_parquet(report.page.parent / "findings.parquet")
    assert table.kind.value_counts().to_dict() == {k: v for k, v in d["findings"].items() if v}


class Tags(HTMLParser):
    "Every tag with its attributes."
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []
    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)


def parse(page):
    tags = Tags()
    tags.feed(page)
    return tags


def test_page_carries_everything_and_runs_nothing(report):
    tags = parse(report.page.read_text())
    images = [a for t, a in tags.found if t == "img"]
    assert len(images) > 40 and all(a.get("alt") and a["src"].startswith("data:image/") for a in images)
    assert not {"script", "iframe", "object", "form", "base"} & {t for t, _ in tags.found}
    links = [a["href"] for t, a in tags.found if "href" in a]
    ids = {a["id"] for _, a in tags.found if "id" in a}
    assert all(h.startswith("data:") or h[1:] in ids for h in links), set(links) - ids
    assert not any(k.startswith("on") for _, a in tags.found for k in a)


def test_names_of_strangers_are_text(tmp_path):
    evil = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "{identity.__class__}", "a\x00b\u202egpj", "'onmouseover='x", "&lt;b&gt;" + "n" * 300]
    _, x, who = people(len(evil) * 2, 5)
    labels = np.array([evil[int(w[1:]) % len(evil)] + ("" if int(w[1:]) < len(evil) else "~") for w in who], dtype=object)
    labels[[0, 7]] = labels[[7, 0]]
    names = [f"{labels[i]}/{i}.png" for i in range(len(x))]
    records = blank(labels, name=evil[1], image=names, ethnicity=[evil[i % 2] for i in range(len(x))])
    found = inspect_dataset(records, tmp_path, embeddings=Embeddings(x), train=blank(labels, evil[0]), train_embeddings=Embeddings(x), rules=Rules(duplicate=.7), estimate=False)
    page = found.page.read_text()
    tags = parse(page)
    assert {t for t, _ in tags.found} <= {"html", "head", "meta", "title", "link", "style", "body", "nav", "b", "ol", "li", "a", "main", "h1", "h2", "h3", "div", "p", "span", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img", "br", "i", "code", "ul"}
    assert not any(k.startswith("on") for _, a in tags.found for k in a) and all(a["src"].startswith("data:") for t, a in tags.found if t == "img")
    assert "\x00" not in page and "\u202e" not in page and "n" * 200 not in page and "{identity.__class__}" in page
    assert evil[0] in "".join(tags.text)                                                # shown as what it is
    assert "<script>" not in found._repr_html_()


def test_page_stays_small(planted, tmp_path):
    "A generator that makes one picture many times: every pair is a finding, the page shows a dozen."
    gen = np.random.default_rng(0)
    x = unit(np.repeat(gen.standard_normal((4, DIM)), 150, 0) + .02 * gen.standard_normal((600, DIM))).astype(np.float32)
    found = inspect_dataset(blank(np.repeat(list("abcd"), 150)), tmp_path, embeddings=Embeddings(x), estimate=False, pictures=3)
    assert found.counts["duplicate"] == 4 * 150 * 149 // 2
    tags = parse(found.page.read_text())
    assert sum(t == "img" for t, _ in tags.found) <= 20 and found.page.stat().st_size < 400_000
    assert "3 of 44,700 shown" in found.page.read_text()
    assert len(pd.read_parquet(tmp_path / "findings.parquet")) == 44_700


def test_photographs_are_left_out_of_published_pages(planted, tmp_path, monkeypatch):
    data = tmp_path / "data"
    blank(planted["labels"]).save(data / "photos")
    monkeypatch.setenv("HYPERFACE_DATA", str(data))
    given = Embeddings(planted["vectors"], dict(id=Records.load(data / "photos").table["image"].astype(str)))
    faces = {}
    for published in "01":
        monkeypatch.setenv("HYPERFACE_PUBLISH", published)
        page = inspect_dataset(data / "photos", tmp_path / f"out{published}", embeddings=given, train=data / "photos", train_embeddings=given, estimate=False).page.read_text()
        faces[published] = page.count("data:image/jpeg")
        assert page.count("data:image/png") >= 3                                        # the figures stay
    assert faces["0"] > 30 and faces["1"] == 0 and "not shown on a published page" in page


def test_damaged_pictures_are_listed_and_the_rest_is_measured(tmp_path):
    gen = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / f"set/{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/{i % 3}/{i}.png").write_bytes(encode_image(gen.integers(0, 255, (112, 112, 3), dtype=np.uint8)))
    (tmp_path / "set/0/half.png").write_bytes(encode_image(gen.integers(0, 255, (112, 112, 3), dtype=np.uint8))[:500])
    (tmp_path / "set/1/page.jpg").write_text("<html>not found</html>")
    (tmp_path / "set/1/empty.jpg").write_bytes(b"")
    from hyperface.extraction.embed import LinearEmbedder
    embedder = LinearEmbedder(np.zeros(588, np.float32), gen.standard_normal((588, 64)).astype(np.float32))
    found = inspect_dataset(tmp_path / "set", tmp_path / "out", embedder, estimate=False)
    assert len(found.subject) == 12 and sorted(kind(found, "unreadable").image) == ["0/half.png", "1/empty.jpg", "1/page.jpg"]
    assert str(tmp_path) not in found.page.read_text().replace("data:", "")                # no path of this machine
    assert found.rates()["unreadable"] == pytest.approx(3 / 15) and "unreadable" in found.exceeded()
    assert read_json(tmp_path / "out/inspect.json")["embedder"]["key"] == embedder.key
    assert len(found.findings.columns) == len(inspection.COLUMNS)


def test_vectors_are_matched_by_name(planted, tmp_path):
    records = blank(planted["labels"])
    names = records.table["image"].astype(str).to_numpy()
    back = Embeddings(planted["vectors"][::-1], dict(id=names[::-1]))
    assert (open_subject(records, embeddings=back).vectors == planted["vectors"]).all()
    part = Embeddings(planted["vectors"][5:], dict(id=names[5:]))
    s = open_subject(records, embeddings=part.save(tmp_path / "part.npz"))
    assert len(s) == len(names) - 5 and s.unreadable.image.tolist() == names[:5].tolist() and (s.labels == planted["labels"][5:]).all()
    with pytest.raises(DataError, match="two vectors for one picture"): open_subject(records, embeddings=Embeddings(planted["vectors"], dict(id=["a", "a", *names[2:]])))
    with pytest.raises(DataError, match="no picture has its name"): open_subject(records, embeddings=Embeddings(planted["vectors"][:9]))


def test_pictures_without_a_label_are_set_aside(planted):
    "The first ten have none: rows of the findings still point to the right pictures."
    labels = planted["labels"].copy()
    labels[:10] = None
    found = inspect_dataset(blank(labels), embeddings=Embeddings(planted["vectors"]), estimate=False)
    assert kind(found, "unlabelled").row.tolist() == list(range(10))
    truth = [i for i in planted["truth"]["wrong_folder"] if i >= 10]
    assert set(kind(found, "wrong_folder").row) == set(truth)
    assert precision_recall_of(pairs(kind(found, "duplicate"), "row", "other_row"), planted["truth"]["copies"]) == (1, 1)
    assert (planted["labels"][kind(found, "split").row] == kind(found, "split").identity).all()


def test_a_set_without_labels_is_inspected_for_what_can_be_seen(planted, tmp_path):
    records = Records.from_arrays(np.zeros((len(planted["vectors"]), 16, 16, 3), np.uint8), "unlabelled")
    found = inspect_dataset(records, tmp_path, embeddings=Embeddings(planted["vectors"]), estimate=False)
    assert set(found.findings.kind) == {"duplicate"}
    assert not {"identities", "uniqueness_rate", "eer_rate", "inter_class_noise_rate"} & set(found.measures.measure)
    assert "no identity labels" in found.page.read_text()
    assert found.rates()["split"] == 0


def test_references_are_what_was_asked_for(planted, tmp_path):
    centre, x, who = people(20, 4)
    given = {f"p{i:03d}": centre[(i + 1) % 20] for i in range(20)}                         # everybody was asked for as the next
    found = inspect_dataset(blank(who), embeddings=Embeddings(x), references=given, estimate=False)
    assert len(kind(found, "wrong_folder")) == 80 and found.counts["split"] == 0
    file = Embeddings(unit(centre).astype(np.float32), dict(identity=[f"p{i:03d}" for i in range(20)])).save(tmp_path / "refs.npz")
    assert not len(inspect_dataset(blank(who), embeddings=Embeddings(x), references=file, estimate=False).findings)
    with pytest.raises(DataError, match="one vector for each identity"):
        inspect_dataset(blank(who), embeddings=Embeddings(x), references=Embeddings(x, dict(identity=who)), estimate=False)


def test_groups_are_counted_by_hand(report, planted):
    n = len(planted["labels"])
    female = np.arange(n) % 4 == 0
    g = report.groups.set_index(["attribute", "group"])
    assert g.pictures["gender", "female"] == female.sum() and g.people["gender", "female"] == len(set(planted["labels"][female]))
    wrong = np.isin(np.arange(n), planted["truth"]["wrong_folder"])
    assert g.flawed_rate["gender", "female"] == pytest.approx(wrong[female].mean())
    age = np.arange(n) % 70 + 5
    assert g.pictures["age", "18-29"] == ((age >= 18) & (age < 30)).sum() and g.pictures["age", "60 and older"] == (age >= 60).sum()
    assert g.share["age"].sum() == pytest.approx(1)
    part = blank(["a", "b", "c", "d"], gender=["female", None, "male", None])
    shares = group_shares(read_attributes(open_subject(part, embeddings=Embeddings(np.eye(4, dtype=np.float32))), False), ["a", "b", "c", "d"])
    assert shares.share.tolist() == [.5, .5] and "2 of 4" in read_attributes(open_subject(part, embeddings=Embeddings(np.eye(4, dtype=np.float32))), False).source["gender"]


def test_limits(report):
    assert set(report.exceeded()) >= {"wrong_folder", "split", "duplicate", "leak"}
    assert report.exceeded(dict.fromkeys(inspection.LIMITS, 1.)) == {}
    assert inspection.read_limits(["leak=0.5"]) == dict(leak=.5)
    for word in ("leak", "leak=2", "ghost=.1", "leak=nan"):
        with pytest.raises(ConfigError, match="KIND=SHARE"): inspection.read_limits([word])


@pytest.mark.parametrize("bad", [dict(outlier=2), dict(same_person=float("nan")), dict(leak="x"), dict(chance=0)])
def test_senseless_rules_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))): Rules(**bad)


def test_output_is_refused_or_whole(planted, tmp_path, monkeypatch):
    records, given = blank(planted["labels"]), Embeddings(planted["vectors"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="The output is a file"): inspect_dataset(records, tmp_path / "file", embeddings=given)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(DataError, match="does not exist"): inspect_dataset(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="different models"):
        inspect_dataset(records, embeddings=Embeddings(planted["vectors"], meta=dict(embedder_key="a")), train=records, train_embeddings=Embeddings(planted["vectors"], meta=dict(embedder_key="b")))
    real = Path.write_bytes
    def full(self, content):
        if self.name.startswith(".index"):
            real(self, content[:100])
            raise OSError(28, "No space left on device")
        return real(self, content)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left"): inspect_dataset(records, tmp_path / "out", embeddings=given, estimate=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["findings.parquet", "inspect.json"]


def test_same_seed_same_numbers(planted):
    once, again = (inspection.to_json(inspect_dataset(blank(planted["labels"]), embeddings=Embeddings(planted["vectors"]), estimate=False, max_pairs=500, seed=4)) for _ in range(2))
    for d in (once, again): d.pop("provenance")
    assert json.dumps(once, default=str) == json.dumps(again, default=str) and once["histograms"]["pairs_drawn"]


def test_one_person_and_single_pictures_give_no_invented_numbers(tmp_path):
    _, x, who = people(1, 6)
    alone = inspect_dataset(blank(who), tmp_path / "a", embeddings=Embeddings(x), estimate=False)
    assert "eer_rate" not in set(alone.measures.measure) and alone.page.exists()
    centre, _, _ = people(12, 1)
    single = inspect_dataset(blank([f"q{i}" for i in range(12)]), tmp_path / "b", embeddings=Embeddings(centre.astype(np.float32)), estimate=False)
    assert not len(single.findings) and "intra_class_noise_rate" not in set(single.measures.measure)


def test_labels_that_are_missing_are_estimated_on_a_sample(arcface):
    from hyperface.data.rendered import render_faces
    faces = render_faces(3, 4, seed=2)
    records = Records.from_arrays(np.stack([faces.pixels(i) for i in range(12)]), "bare", identity=list(faces.identities), age=faces.table["age"].to_numpy())
    found = read_attributes(open_subject(records, embeddings=Embeddings(np.eye(12, dtype=np.float32))), sample=5, seed=1)
    assert found.source["age"].startswith("labels of the set") and "estimated by genderage_mx.onnx on 5 of 12" in found.source["gender"]
    assert len(found.known("yaw")) == 5 and len(found.known("age")) == 12
    assert np.corrcoef(found.known("yaw").yaw.astype(float), faces.table["yaw"].to_numpy()[found.known("yaw").row])[0, 1] > .8


def test_photographs_with_planted_faults(lfw, arcface, tmp_path, monkeypatch):
    "Sixteen people of LFW, labels spoilt, six pictures saved again."
    from hyperface.data.formats import read_dataset
    from hyperface.data.images import decode_image
    monkeypatch.delenv("HYPERFACE_PUBLISH", raising=False)
    everybody = read_dataset(lfw)
    who = np.array([str(v) for v in everybody.identities])
    names = [n for n, c in zip(*np.unique(who, return_counts=True)) if 8 <= c <= 12][:16]
    rows = np.concatenate([np.flatnonzero(who == n)[:6] for n in names])
    x = np.stack([everybody.pixels(i) for i in rows])
    _, labels, truth = plant_faults(np.eye(len(x)), who[rows], wrong_folder=6, split=3, copies=6, seed=0)
    source = [a for a, _ in sorted(truth["copies"], key=lambda p: p[1])]
    copies = [decode_image(encode_image(x[i], "jpg", 60)) for i in source]
    found = inspect_dataset(Records.from_arrays(np.concatenate([x, copies]), "lfw", identity=list(labels)), tmp_path, "w600k_mbf_dequant_fp32", estimate=False)
    assert found.faults.mean is None and found.measures.set_index("measure").value["eer_rate"] < .15
    assert precision_recall_of([*kind(found, "wrong_folder").row, *kind(found, "outlier").row], truth["wrong_folder"]) == (1, 1)
    assert precision_recall_of(pairs(kind(found, "duplicate"), "row", "other_row"), truth["copies"])[1] == 1
    assert precision_recall_of(pairs(kind(found, "split"), "identity", "other_identity"), truth["split"])[1] >= 2 / 3


def test_page_in_a_browser(report, tmp_path):
    from test_report_page import BROWSER, DevTools
    if BROWSER is None: pytest.skip("no Chromium on this machine")
    tools = DevTools(tmp_path)
    try:
        for width in (400, 1300):
            tools.open(report.page, width)
            assert tools.complaints() == []
            assert tools.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
            assert tools.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"scrolls sideways at {width}"
            assert tools.evaluate("Math.min(...[...document.querySelectorAll('p,td,th,li,a,figcaption')].filter(e => e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
    finally: tools.close()

"""The committed run of the profile `study`, and what README.md says of it."""
import json
import re
import subprocess

import numpy as np
import pandas as pd
import pytest

from hyperface.core import project_root
from hyperface.pipeline import find_steps
from hyperface.report.printed import number, printed
from hyperface.report.results import read_records, results_frame

STUDY = project_root() / "reports" / "study"


@pytest.fixture(scope="module")
def results():
    return pd.read_parquet(STUDY / "results.parquet")


@pytest.fixture(scope="module")
def headline():
    "Lines of README's table of results: what, measured, printed, page."
    part = (project_root() / "README.md").read_text(encoding="utf-8").partition("## What comes out")[2].partition("\n## ")[0]
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in part.splitlines() if line.startswith("| ") and "](nbs/" in line]
    assert len(lines) >= 8
    return [(what, measured, there, re.search(r"nbs/paper/(\w+)\.ipynb", page)[1]) for what, measured, there, page in lines]


def numbers(text: str) -> list[tuple[float, int]]:
    "Every number of a text, and its digits after the point."
    return [(float(n.replace(",", "")), len(n.partition(".")[2])) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


def test_every_page_ran_with_three_seeds_and_none_failed():
    run = json.loads((STUDY / "run.json").read_text())
    assert run["profile"] == "study" and run["sizes"]["seeds"] >= 3 and not run["failed"]
    assert set(run["steps"]) == set(find_steps()) and {s["status"] for s in run["steps"].values()} == {"done"}
    assert all(run["data"][name] for name in ("lfw", "utkface", "fer2013", "ckplus48", "models"))     # the four .bin sets are for whoever has them


def test_results_are_the_numbers_of_the_tables(results):
    again = results_frame(STUDY)
    pd.testing.assert_frame_equal(results.reset_index(drop=True), again, check_dtype=False)
    assert set(results.profile) == {"study"} and results.data.str.len().min() > 0 and results.commit.str.fullmatch(r"[0-9a-f]{7,40}").all()


def test_every_record_has_its_files_a_verdict_and_a_place_on_the_page():
    page = (STUDY / "index.html").read_text(encoding="utf-8")
    records = read_records(STUDY)
    assert len(records) > 100 and not any(r["kind"] == "damaged" for r in records)
    for r in records:
        assert all((STUDY / f).stat().st_size > 0 for f in r["files"]), r["name"]
        assert r["status"] == "computed" or r["why"], r["name"]
        assert f'id="{r["kind"]}-{r["name"]}"' in page, r["name"]
    assert {f"table{i}" for i in range(1, 10)} <= {r["name"] for r in records}


def test_measured_numbers_of_the_readme_are_results_of_the_page_they_name(results, headline):
    for what, measured, _, page in headline:
        known = results[results.step == page][["value", "low", "high"]].to_numpy().ravel()
        known = known[np.isfinite(known)]
        found = numbers(re.sub(r"[()\[\];/]", " ", measured))
        assert found, what
        for value, digits in found:
            assert np.isclose(np.round(known, digits), value, atol=10.**-digits/1e3).any(), (what, value)


def test_printed_numbers_of_the_readme_are_printed(headline):
    t8, t9 = printed("table8").set_index("method"), printed("table9")["accuracy"]
    known = {round(float(v), 1) for v in [*t8.to_numpy().ravel(), *t9, t9.iloc[-1] - t9.iloc[0], *(t8.iloc[-1] - t8).to_numpy().ravel()]}
    known.add(number(printed("table2").set_index("feature").loc["Accuracy (LFW Benchmark)", "ArcFace"]))
    found = {v for _, _, there, _ in headline for v, _ in numbers(re.sub(r"\(Table \d\)", "", there))}
    assert found and found <= known


def test_figures_of_the_readme_are_those_of_the_run():
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]*\]\((reports/study/figures/[^)]+)\)", text)
    assert len(shown) == 2
    for path in shown:
        assert (project_root() / path).read_bytes()[:4] == b"\x89PNG"


def test_what_is_committed_is_tables_figures_records_and_pages():
    files = subprocess.run(["git", "ls-files", "reports/study"], cwd=project_root(), capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a clone")
    kept = {f.split("/")[2] for f in files}
    assert kept <= {"figures", "tables", "records", "steps", "index.html", "results.parquet", "run.json"}       # neither arrays nor notebooks


def test_tables_8_and_9_have_intervals_and_the_spread_over_seeds(results):
    for table in ("table8", "table9", "table9_alone"):
        gains = results[(results.table == table) & results.column.str.contains("gain|minus") & ~results.column.str.startswith("paper") & ~results.column.str.contains("±")]
        assert len(gains) and gains.low.notna().all() and (gains.low <= gains.value).all() and (gains.value <= gains.high).all()
        assert results[(results.table == table) & results.column.str.contains("±")].value.ge(0).any()

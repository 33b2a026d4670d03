"""The site of the notebooks: every page is in it, every equation is one, and a browser without a network shows all of it."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from devtools import BROWSER, DevTools

ROOT = Path(__file__).resolve().parents[1]


def load(path: str):
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


docs = load("tools/docs.py")


def notebook(path: Path) -> list[dict]:
    return [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text())["cells"]]


def markdown(path: Path) -> list[str]:
    return [c["source"] for c in notebook(path) if c["cell_type"] == "markdown" and c["id"] != "package"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return docs.lay_out(tmp_path_factory.mktemp("docs") / "source")


def entries(index: str) -> list[str]:
    "Pages that the front page's tables of contents name."
    return [line for tree in re.findall(r"```\{toctree\}(.*?)```", index, flags=re.S) for line in tree.splitlines() if line and not line.startswith(":")]


def test_every_notebook_and_module_is_in_the_contents_once_and_in_order(source):
    found = entries((source / "index.md").read_text())
    notebooks = [p.relative_to(ROOT).with_suffix("").as_posix() for folder in ("nbs", "nbs/paper") for p in (ROOT / folder).glob("*.ipynb") if p.stem != "index"]
    modules = ["api/" + ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "hyperface").rglob("*.py") if not p.name.startswith("_")]
    assert sorted(found) == sorted(notebooks + modules)
    library = [e for e in found if re.match(r"nbs/\d", e)]
    assert library == sorted(library)
    assert all((source / f"{e}{'.md' if e.startswith('api') else '.ipynb'}").is_file() for e in found)


def test_links_and_pictures_lead_to_laid_out_pages(source):
    for path in [source / "index.md", *source.rglob("*.ipynb"), *source.glob("api/*.md")]:
        text = path.read_text() if path.suffix == ".md" else "\n".join(markdown(path))
        for link in re.findall(r"\]\(([^)#\s]+\.(?:ipynb|md|png|jpe?g))\)", text):
            assert link.startswith("http") or (path.parent / link).resolve().is_file(), (path.name, link)


def test_pages_keep_text_code_and_outputs_and_lose_only_directives(source):
    for path in docs.notebooks()[::3]:
        here, there = notebook(path), notebook(source / path.relative_to(ROOT))
        assert not re.search(r"(?m)^#\|", "\n".join(c["source"] for c in there))
        assert markdown(path) == markdown(source / path.relative_to(ROOT))
        assert [c.get("outputs", []) for c in here if c.get("outputs") and "#| hide" not in c["source"]] == [c["outputs"] for c in there if c.get("outputs")]


def test_laying_out_again_touches_nothing_and_clears_what_is_gone(source):
    before = {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()}
    (source / "nbs" / "99_gone.ipynb").write_text("{}")
    docs.lay_out(source)
    assert {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()} == before


def test_api_pages_show_names_docstrings_and_the_comments_of_parameters(source):
    page = (source / "api" / "hyperface.report.compare.md").read_text()
    assert "# hyperface.report.compare" in page and "## margin_of_difference" in page and "# value of one run and the ends of its interval" in page
    assert "Set two runs beside each other" in page and "(../nbs/85_compare.ipynb)" in page and "_origin" not in page
    assert "    np.hypot" not in page                                        # signatures, not bodies


def test_the_site_executes_nothing_and_fetches_nothing():
    conf = (ROOT / "docs" / "conf.py").read_text()
    assert 'nb_execution_mode = "off"' in conf and 'html_math_renderer = "mathml"' in conf
    assert not re.search(r"https?://", conf) and "mathjax_path" not in conf
    assert "_docs/" in (ROOT / ".gitignore").read_text() and "tools/docs.py" in (ROOT / "Makefile").read_text()


EQUATION = re.compile(r"\$\$(.+?)\$\$|(?<![\\\w$])\$(?!\s)([^$\n]{1,300}?)(?<!\s)\$(?![\w$])", re.S)


def test_every_equation_of_every_page_becomes_mathml():
    from hyperface.report.page import math_html
    found = set()
    for path in docs.notebooks():
        for text in markdown(path):
            found |= {a or b for a, b in EQUATION.findall(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S))}
    assert len(found) > 300
    assert [e for e in found if not math_html(e).startswith("<math")] == []


@pytest.fixture(scope="module")
def site(source):
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    out = source.parent / "html"
    assert docs.build(source, out) == 0                                      # warnings are errors
    return out


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    tools = DevTools(tmp_path_factory.mktemp("browser"))
    tools.call("Network.enable")
    tools.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    yield tools
    tools.close()


DRAWN = """(() => { const all = [...document.querySelectorAll('math')], prose = document.querySelector('article').cloneNode(true);
  prose.querySelectorAll('pre, code, script').forEach(e => e.remove());
  return {all: all.length, drawn: all.filter(m => m.getBoundingClientRect().width > 2 && m.getBoundingClientRect().height > 5).length,
          raised: [...document.querySelectorAll('msup')].filter(m => m.children[1].getBoundingClientRect().top < m.children[0].getBoundingClientRect().top).length, msup: document.querySelectorAll('msup').length,
          raw: prose.textContent.match(/\\$[^$\\n]{1,80}\\$/g)}; })()"""


@pytest.mark.slow
@pytest.mark.parametrize("page, equations", [("nbs/71_margins", 20), ("nbs/30_geometry", 10), ("nbs/54_losses", 20), ("nbs/paper/t1_embedding_statistics", 1), ("index", 0)])
def test_pages_in_a_browser_without_a_network(site, offline, page, equations):
    offline.events.clear()
    offline.open(site / f"{page}.html", 1300)
    assert offline.evaluate("navigator.onLine") is False
    assert offline.complaints() == []
    found = offline.evaluate(DRAWN)
    assert found["all"] >= equations and found["drawn"] == found["all"], found
    assert found["raised"] == found["msup"] and found["raw"] is None, found   # exponents stand above; no dollar signs are left
    pictures = 1 if page == "index" else sum(k.startswith("image/") for c in notebook(ROOT / f"{page}.ipynb") for o in c.get("outputs", []) for k in o.get("data", {}))
    assert offline.evaluate("document.querySelectorAll('article img').length") == pictures
    assert offline.evaluate("[...document.querySelectorAll('article img')].filter(i => { i.loading = 'eager'; return i.complete && !i.naturalWidth; }).map(i => i.src)") == []
    assert offline.evaluate("getComputedStyle(document.querySelector('.sidebar-drawer')).display") != "none"


@pytest.mark.slow
def test_search_finds_a_notebook_and_a_function_without_a_network(site, offline):
    import time
    for words, expected in (("Newcombe", "nbs/85_compare"), ("margin_of_difference", "api/hyperface.report.compare")):
        offline.call("Page.enable")
        offline.call("Page.navigate", url=(site / "search.html").as_uri() + f"?q={words}")
        deadline, links = time.monotonic() + 60, []
        while time.monotonic() < deadline and not any(expected in link for link in links):
            time.sleep(.2)
            links = offline.evaluate("[...document.querySelectorAll('#search-results a')].map(a => a.href)") or []
        assert any(expected in link for link in links), (words, links)


@pytest.mark.slow
def test_no_page_of_the_site_asks_for_anything_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//', text), path
        assert not re.search(r'<link\b[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="(?:https?:)?//', text), path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import ['\"]?https?:", path.read_text()), path


@pytest.mark.slow
def test_an_equation_that_is_none_stops_the_build(tmp_path):
    pytest.importorskip("myst_nb")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "index.md").write_text("# Broken\n\n$\\frac{1}{$ is no equation.\n")
    code = "import sys; sys.path.insert(0, 'tools'); import docs; from pathlib import Path; sys.exit(docs.build(Path(sys.argv[1]), Path(sys.argv[2])))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "no MathML" in done.stderr

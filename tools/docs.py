"""The notebooks as a site that is searched and read without a network: `make docs`, then open _docs/html/index.html.

    python tools/docs.py          lay the sources out in _docs/source and build _docs/html
    python tools/docs.py sources  lay them out only

The front page is README.md with a table of contents after it, chapter by chapter; each module has a page of what it exports, read from
its source, so that the comments beside the parameters are there too.
"""
from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE, SITE = ROOT / "nbs", ROOT / "hyperface", ROOT / "_docs"
CHAPTERS = {"0": "Foundations", "1": "Faces", "2": "Extraction", "3": "The sphere", "4": "Metrics", "5": "StyleGAN2-ADA", "6": "Vec2Face and generation", "7": "Recognition",
            "8": "Report", "9": "Running", "t": "The paper: tables", "f": "The paper: figures", "h": "The paper: HyperFace's benchmark", "v": "The paper: Vec2Face", "r": "The paper: further results", "j": "The paper: fairness", "e": "The paper: experiments", "a": "The paper: audit"}


def notebooks() -> list[Path]:
    "Every notebook with a page of its own: the library's in order, then the paper's."
    found = [*NBS.glob("*.ipynb"), *(NBS / "paper").glob("*.ipynb")]
    order = {key: i for i, key in enumerate(CHAPTERS)}
    found = [p for p in found if not p.name.startswith((".", "_")) and p.name != "index.ipynb"]
    return sorted(found, key=lambda p: (order.get(p.name[0], len(order)), p.name))


def modules() -> dict[str, Path]:
    "Module -> its file, for each that a notebook exports."
    files = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def cells(path: Path) -> tuple[dict, list[dict]]:
    "A notebook, and its cells with their text in one piece."
    nb = json.loads(path.read_text(encoding="utf-8"))
    return nb, [cell | {"source": "".join(cell["source"])} for cell in nb["cells"]]


def exported_to(path: Path) -> str | None:
    "The module that a notebook exports to."
    hit = re.search(r"(?m)^#\| *default_exp +(\S+)", "\n".join(c["source"] for c in cells(path)[1] if c["cell_type"] == "code"))
    return f"hyperface.{hit[1]}" if hit else None


def page(path: Path) -> str:
    "A notebook without the words that are for nbdev, with a link to what it exports."
    nb, found = cells(path)
    module, kept = exported_to(path), []
    for cell in found:
        if cell["cell_type"] == "code":
            if re.search(r"(?m)^#\| *hide *$", cell["source"]):
                continue
            if re.search(r"(?m)^#\| *echo: *false", cell["source"]):
                cell["metadata"] = {"tags": [*cell["metadata"].get("tags", []), "remove-input"]}
            cell["source"] = "\n".join(line for line in cell["source"].splitlines() if not line.startswith("#|")).strip()
            if not cell["source"] and not cell["outputs"]:
                continue
        kept.append(cell)
    if module:
        kept.insert(1, dict(cell_type="markdown", id="package", metadata={}, source=f"In the package: [{module}](../api/{module}.md)."))
    return json.dumps(nb | {"cells": kept}, ensure_ascii=False, indent=1) + "\n"


def signature(source: list[str], node: ast.AST) -> str:
    "A definition up to its body, as written: the comments say what each parameter is."
    first, body = min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.body[0].lineno
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        lines = source[first - 1:node.lineno]
        lines += source[init.lineno - 1:init.body[0].lineno - 1] if init and init.body[0].lineno > init.lineno else []
        lines += [line for n in fields for line in source[n.lineno - 1:n.end_lineno]]
    else:
        lines = source[first - 1:max(node.lineno, body - 1)]
    return textwrap.dedent("\n".join(lines))


def api_page(module: str, path: Path, notebook: str | None) -> str:
    "What a module exports: names, docstrings, signatures with their comments."
    text = path.read_text(encoding="utf-8")
    tree, source = ast.parse(text), text.splitlines()
    parts = [f"# {module}", ast.get_docstring(tree) or "", f"Explained in [the notebook](../{notebook})." if notebook else ""]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            parts += [f"## {node.name}", ast.get_docstring(node) or "", f"```python\n{signature(source, node)}\n```"]
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    parts += [f"### {node.name}.{inner.name}", ast.get_docstring(inner) or "", f"```python\n{signature(source, inner)}\n```"]
    return "\n\n".join(p for p in parts if p) + "\n"


def toctree(caption: str, names: list[str]) -> str:
    return "```{toctree}\n:hidden:\n:maxdepth: 1\n:caption: " + caption + "\n\n" + "\n".join(names) + "\n```"


def index_page() -> str:
    "README.md, and every page in order behind it."
    readme = re.sub(r"\A<!--.*?-->\s*", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    trees = []
    for key, caption in CHAPTERS.items():
        names = [p.relative_to(ROOT).with_suffix("").as_posix() for p in notebooks() if p.name[0] == key]
        trees += [toctree(caption, names)] if names else []
    readme = re.sub(r"(?<!!)\[([^\]]+)\]\(reports/[^)]*\)", r"`\1`", readme)            # a report has no page here, its pictures have a place
    return "\n\n".join([readme.rstrip(), *trees, toctree("The package", [f"api/{m}" for m in modules()])]) + "\n"


def lay_out(target: Path = SITE / "source") -> Path:
    "Everything that Sphinx reads, anew; a file that is as before keeps its time, so that it is not built again."
    wanted = {"index.md": index_page()}
    made_by = {exported_to(p): p.relative_to(ROOT).as_posix() for p in notebooks()}
    wanted |= {p.relative_to(ROOT).as_posix(): page(p) for p in notebooks()}
    wanted |= {f"api/{m}.md": api_page(m, p, made_by.get(m)) for m, p in modules().items()}
    pictures = {p.relative_to(ROOT).as_posix(): p for p in (NBS / "images").glob("*")}
    pictures |= {name: ROOT / name for name in re.findall(r"!\[[^\]]*\]\((reports/[^)\s]+)\)", wanted["index.md"])}
    for old in [p for p in target.rglob("*") if p.is_file()] if target.exists() else []:
        if old.relative_to(target).as_posix() not in wanted | pictures:
            old.unlink()
    for name, content in (wanted | {n: p.read_bytes() for n, p in pictures.items()}).items():
        path, content = target / name, content.encode() if isinstance(content, str) else content
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    return target


def build(source: Path, out: Path = SITE / "html") -> int:
    "Run Sphinx; a warning is an error, because it is a link or an equation that does not work."
    try:
        import myst_nb, sphinx, furo  # noqa: F401, E401
    except ImportError as e:
        sys.exit(f"{e.name} is not installed: pip install -c constraints.txt -e '.[dev]'")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    shutil.rmtree(out / "_sources", ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(out.with_name("doctrees")), "-q", "-W", "--keep-going", str(source), str(out)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["all", "sources"], default="all")
    args = parser.parse_args()
    source = lay_out()
    if args.action == "all":
        status = build(source)
        print(f"{len(notebooks())} notebooks, {len(modules())} modules -> {SITE / 'html' / 'index.html'}" if not status else "the site has faults, see above")
        sys.exit(status)


if __name__ == "__main__":
    main()

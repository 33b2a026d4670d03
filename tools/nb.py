"""Notebooks as text, run, exported and checked. One tool, one direction at a time.

    python tools/nb.py text  [NAME ...]   notebooks -> nbs/_src/*.py twins (py:percent), to edit in an editor
    python tools/nb.py nb    [NAME ...]   twins -> notebooks; outputs of unchanged cells and cell ids stay
    python tools/nb.py export [NAME ...]  notebooks -> hyperface/*.py
    python tools/nb.py run   [NAME ...]   execute in place with a fresh kernel and keep the outputs
    python tools/nb.py build NAME ...     nb + export + run
    python tools/nb.py adopt  REPORT [NAME ...]  outputs of the paper's notebooks from a report made with HYPERFACE_PUBLISH=1
    python tools/nb.py readme             nbs/index.ipynb -> README.md
    python tools/nb.py check              exit 1 if package, README or notebooks are out of step; writes nothing

NAME is a path, a file name or the start of one: `00`, `nbs/paper/t1_embedding_statistics.ipynb`.
"""
from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS, SRC, PACKAGE = ROOT / "nbs", ROOT / "nbs" / "_src", ROOT / "hyperface"
FORMAT = {"extension": ".py", "format_name": "percent"}
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def notebooks() -> list[Path]:
    "Every notebook of ours: the library's and the paper's."
    found = [*NBS.glob("*.ipynb"), *(NBS / "paper").glob("*.ipynb")]
    return sorted(path for path in found if not path.name.startswith((".", "_")))


def twin(notebook: Path) -> Path:
    return SRC / notebook.relative_to(NBS).with_suffix(".py")


def select(names: list[str], candidates: list[Path]) -> list[Path]:
    "The candidates that the names mean; all of them if there are no names."
    if not names:
        return candidates
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb").removesuffix(".py")
        hits = [path for path in candidates if path.stem == stem] or [p for p in candidates if p.stem.startswith(stem)]
        if not hits:
            sys.exit(f"no notebook called {name}; there are: " + ", ".join(p.stem for p in candidates))
        chosen += hits
    return chosen


def stable_id(source: str, kind: str, taken: set[str]) -> str:
    "An eight-character cell id from the cell's text, so that the same text gives the same notebook."
    for salt in range(1000):
        cell_id = hashlib.sha256(f"{kind}\0{salt}\0{source}".encode()).hexdigest()[:8]
        if cell_id not in taken:
            return cell_id
    raise RuntimeError("too many equal cells")


def joined(outputs: list) -> list:
    "Consecutive pieces of one stream as one: where it is cut depends on timing."
    kept: list = []
    for output in outputs:
        if kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def clean(nb):
    "Drop what differs from run to run: execution counts, timings, kernel details, all cell metadata but tags."
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell in nb.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = None
            if "metadata" in output:
                output["metadata"] = nbformat.from_dict({})
            for mime in ("text/plain", "text/html"):  # memory addresses differ from run to run
                if isinstance(output.get("data", {}).get(mime), str):
                    output["data"][mime] = re.sub(r" at 0x[0-9a-f]{6,}", "", output["data"][mime])
    return nb


def write(nb, path: Path) -> bool:
    "Write if it differs; a notebook file ends with a newline."
    text = nbformat.writes(nb, version=4).rstrip("\n") + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return True


def to_text(notebook: Path) -> None:
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    twin(notebook).parent.mkdir(parents=True, exist_ok=True)
    twin(notebook).write_text(jupytext.writes(nb, fmt=FORMAT), encoding="utf-8")


def to_notebook(source: Path) -> Path:
    "Twin -> notebook. A cell whose text is unchanged keeps its id and outputs; so does an edited one its id."
    path = NBS / source.relative_to(SRC).with_suffix(".ipynb")
    new = jupytext.reads(source.read_text(encoding="utf-8"), fmt=FORMAT)
    old = nbformat.read(path, as_version=4).cells if path.exists() else []
    by_text: dict = {}
    for cell in old:
        by_text.setdefault((cell.cell_type, cell.source), []).append(cell)
    taken: set[str] = set()
    for cell in new.cells:
        same = by_text.get((cell.cell_type, cell.source))
        if same:
            previous = same.pop(0)
            cell.id = previous.id
            if cell.cell_type == "code":
                cell.outputs = previous.outputs
        else:
            cell.id = stable_id(cell.source, cell.cell_type, taken | {c.id for c in old if "id" in c})
        taken.add(cell.id)
    write(clean(new), path)
    return path


def export(paths: list[Path], target: Path = PACKAGE) -> None:
    "Export library notebooks to the package (nbdev), and make the package's __init__ files."
    from nbdev.export import nb_export
    for path in paths:
        if path.parent.name == "nbs" and path.name != "index.ipynb":
            nb_export(path, lib_path=target)
    for folder in [target, *(p for p in target.rglob("*") if p.is_dir() and any(p.glob("*.py")))]:
        if not (folder / "__init__.py").exists():
            (folder / "__init__.py").write_text("")


def run(path: Path, timeout: int = 3600) -> float:
    "Execute in place with a fresh kernel in the notebook's own folder."
    import time

    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    started = time.monotonic()
    os.environ.setdefault("HYPERFACE_PROGRESS", "0")   # progress bars are noise on a printed page
    os.environ.setdefault("HYPERFACE_PUBLISH", "1")    # committed pages carry no photograph of a real person's data set
    from hyperface.pipeline import with_kernel
    with_kernel(lambda: NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(NBS)}},
                                       extra_arguments=["--IPKernelApp.log_level=50"]).execute())
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    write(clean(nb), path)
    return time.monotonic() - started


def slim(output):
    "The same picture without an alpha channel that hides nothing: a seventh less to store."
    import base64
    import io

    from PIL import Image
    data = output.get("data", {})
    if len(data.get("image/png", "")) > 20_000:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
        if picture.mode == "RGBA" and picture.getextrema()[3] == (255, 255):
            stored = io.BytesIO()
            picture.convert("RGB").save(stored, "PNG", optimize=True)
            data["image/png"] = base64.b64encode(stored.getvalue()).decode()
    return output


def adopt(report: Path, names: list[str]) -> None:
    "Take over the outputs of executed paper notebooks, cell by cell; refuse where the code differs or a cell failed."
    for path in select(names, sorted((NBS / "paper").glob("[!._]*.ipynb"))):
        done = report / "notebooks" / path.name
        if not done.exists():
            sys.exit(f"{done} is missing: HYPERFACE_PUBLISH=1 hyperface reproduce --out {report}")
        nb, executed = nbformat.read(path, as_version=4), nbformat.read(done, as_version=4)
        ours = [c for c in nb.cells if c.cell_type == "code"]
        theirs = [c for c in executed.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
        if [c.source for c in ours] != [c.source for c in theirs]:
            sys.exit(f"{path.name} has changed since {done}")
        for cell, other in zip(ours, theirs):
            cell.outputs = [slim(o) for o in other.outputs if o.get("name") != "stderr"]
            if any(o.output_type == "error" for o in cell.outputs):
                sys.exit(f"{done} ended with an error")
        write(clean(nb), path)


def from_root(text: str) -> str:
    "Markdown written for nbs/index.ipynb with its relative links as README.md needs them."
    return re.sub(r"\]\((?![a-z]+:|#|/)([^)\s]+)\)", lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", text)


def readme_text() -> tuple[str, dict[str, bytes]]:
    "README.md from index.ipynb: markdown as it is, code fenced, outputs below it; pictures become files."
    import base64
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    parts, pictures = ["<!-- Made from nbs/index.ipynb by tools/nb.py; edit the notebook. -->"], {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts.append(from_root(cell.source))
            continue
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        hide = "#| hide" in cell.source
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if code and not hide and "#| echo: false" not in cell.source:
            parts.append(f"```python\n{code}\n```")
        for output in [] if hide else cell.outputs:
            data = output.get("data", {})
            mime = next((m for m in ("image/png", "image/jpeg") if m in data), None)
            if mime:
                name = f"nbs/images/index-{cell.id}.{mime.split('/')[1]}"
                pictures[name] = base64.b64decode(data[mime])
                parts.append(f"![]({name})")
            elif "text/markdown" in data:
                parts.append(from_root("".join(data["text/markdown"])))
            elif "text/plain" in data or "text" in output:
                parts.append("```\n" + str(data.get("text/plain", output.get("text", ""))).rstrip() + "\n```")
    return "\n\n".join(parts).rstrip() + "\n", pictures


def readme() -> None:
    text, pictures = readme_text()
    for name, content in pictures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(content)
    for stale in (NBS / "images").glob("index-*"):
        if stale.relative_to(ROOT).as_posix() not in pictures:
            stale.unlink()
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def problems() -> list[str]:
    "What is out of step, in words."
    found = []
    with tempfile.TemporaryDirectory() as folder:
        target, copies = Path(folder) / "hyperface", Path(folder) / "nbs"  # side by side: headers carry relative paths
        target.mkdir()
        copies.mkdir()
        shutil.copy(ROOT / "pyproject.toml", folder)
        for path in notebooks():
            if path.parent == NBS:
                shutil.copy(path, copies)
        export(sorted(copies.glob("*.ipynb")), target)
        made = {p.relative_to(target) for p in target.rglob("*.py")}
        kept = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
        for name in sorted(made | kept):
            if name.name in ("_modidx.py", "__init__.py"):
                continue
            if name not in made:
                found.append(f"hyperface/{name} has no notebook")
            elif name not in kept:
                found.append(f"hyperface/{name} was never exported")
            elif not filecmp.cmp(target / name, PACKAGE / name, shallow=False):
                found.append(f"hyperface/{name} differs from its notebook: python tools/nb.py export")
    for path in notebooks():
        nb = nbformat.read(path, as_version=4)
        if nbformat.writes(clean(nbformat.from_dict(nb.copy())), version=4).strip() != path.read_text(encoding="utf-8").strip():
            found.append(f"{path.relative_to(ROOT)} carries run-to-run metadata: python tools/nb.py clean {path.stem}")
        for cell in nb.cells:
            if cell.cell_type == "code" and any(o.output_type == "error" for o in cell.outputs):
                found.append(f"{path.relative_to(ROOT)} is committed with an error in cell {cell.id}")
    if (NBS / "index.ipynb").exists():
        text, pictures = readme_text()
        if not (ROOT / "README.md").exists() or (ROOT / "README.md").read_text(encoding="utf-8") != text:
            found.append("README.md differs from nbs/index.ipynb: python tools/nb.py readme")
        for name, content in pictures.items():
            if not (ROOT / name).exists() or (ROOT / name).read_bytes() != content:
                found.append(f"{name} differs from nbs/index.ipynb: python tools/nb.py readme")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["text", "nb", "export", "run", "build", "clean", "adopt", "readme", "check"])
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.action == "check":
        found = problems()
        print("\n".join(found) or "notebooks, package and README are in step")
        sys.exit(bool(found))
    if args.action == "readme":
        return readme()
    if args.action == "adopt":
        return adopt(Path(args.names[0] if args.names else "reports/quick"), args.names[1:])
    if args.action == "build" and not args.names:
        sys.exit("build needs names; `nb`, `export` and `run` take all by default")
    if args.action in ("nb", "build"):
        sources = sorted(p for p in SRC.rglob("*.py"))
        chosen = [to_notebook(path) for path in select(args.names, sources)]
    else:
        chosen = select(args.names, notebooks())
    if args.action == "text":
        for path in chosen:
            to_text(path)
    if args.action == "clean":
        for path in chosen:
            write(clean(nbformat.read(path, as_version=4)), path)
    if args.action in ("export", "build"):
        export(chosen)
    if args.action in ("run", "build"):
        for path in chosen:
            print(f"{path.relative_to(ROOT)} ...", flush=True)
            print(f"{path.relative_to(ROOT)}: {run(path):.1f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""Notebooks, package, README and pins say the same thing."""
import ast
import configparser
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def load_tool():
    spec = importlib.util.spec_from_file_location("nb_tool", ROOT / "tools" / "nb.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def settings() -> dict:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def requirements(*keys: str) -> dict[str, Requirement]:
    lines = [line.strip() for key in keys for line in settings()[key].splitlines() if line.strip()]
    return {Requirement(line).name: Requirement(line) for line in lines}


def test_package_and_readme_come_from_the_notebooks():
    assert load_tool().problems() == []


def test_check_sees_a_hand_edited_module(tmp_path):
    import shutil
    copy = tmp_path / "repo"
    for name in ("nbs", "hyperface", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_src"))
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, copy)
    module = copy / "hyperface" / "core.py"
    module.write_text(module.read_text() + "\nedited = True\n")
    (copy / "hyperface" / "orphan.py").write_text("x = 1\n")
    spec = importlib.util.spec_from_file_location("nb_tool_copy", copy / "tools" / "nb.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = "\n".join(tool.problems())
    assert "hyperface/core.py differs" in found and "hyperface/orphan.py has no notebook" in found


def test_one_version_everywhere():
    import hyperface
    assert hyperface.__version__ == settings()["version"]
    assert f"version: {hyperface.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {hyperface.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_environment_yml_asks_for_the_same():
    ours = requirements("requirements", "dev_requirements")
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(d["pip"] for d in dependencies if isinstance(d, dict))
    theirs = [d for d in dependencies if isinstance(d, str)] + [p for p in pip if p != "-e ."]
    names = {"pytorch": "torch", "python-lmdb": "lmdb", "msgpack-python": "msgpack"}
    theirs = {names.get(r.name, r.name): r for r in map(Requirement, theirs)}
    assert "-e ." in pip and str(theirs.pop("python").specifier) == "<3.12,>=3.11"
    theirs.pop("pip")
    assert {n: r.specifier for n, r in theirs.items()} == {n: r.specifier for n, r in ours.items()}


def test_constraints_pin_every_requirement_inside_its_range():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in pinned.items()}
    for name, requirement in requirements("requirements", "dev_requirements").items():
        assert requirement.specifier.contains(pinned[re.sub(r"[-_.]+", "-", name).lower()]), name


def test_pyproject_leaves_everything_to_settings_ini():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"version", "dependencies", "scripts"} <= set(project["dynamic"]) and "dependencies" not in project
    assert project["requires-python"] == f">={settings()['min_python']}"


CHAPTER = {"core": 0, "config": 0, "loop": 0, "style": 0, "weights": 0, "data": 1, "extraction": 2, "sphere": 3, "metrics": 4, "stylegan2": 5, "recognition": 6,
           # told before chapter 7, but built on it: a generator of identities is trained and judged with a recogniser
           "vec2face": 7, "identities": 7, "generate": 7, "arc2face": 7, "report": 8, "pipeline": 9, "cli": 9}


def package_imports(anywhere: bool = True) -> dict[str, set[str]]:
    "module -> modules of ours that it imports: anywhere, also inside functions, or only when it is itself imported."
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "hyperface").rglob("*.py") if not p.name.startswith("_")}
    graph = {}
    for module, path in files.items():
        found = set()
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if anywhere else tree.body:
            if isinstance(node, ast.ImportFrom):
                base = module.split(".")[:-node.level] if node.level else []
                name = ".".join([*base, *([node.module] if node.module else [])])
                found |= {name, *(f"{name}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
        graph[module] = found & set(files) - {module}
    return graph


def test_imports_point_one_way():
    chapter = lambda module: CHAPTER[module.split(".")[1]]
    backwards = [f"{m} -> {i}" for m, imports in package_imports().items() for i in imports if chapter(i) > chapter(m)]
    assert backwards == []
    graph = package_imports(anywhere=False)
    state: dict[str, int] = {}

    def visit(module, path):
        assert state.get(module) != 1, "circle: " + " -> ".join([*path, module])
        if state.get(module) == 2:
            return
        state[module] = 1
        for other in sorted(graph[module]):
            visit(other, [*path, module])
        state[module] = 2

    for module in graph:
        visit(module, [])


def test_importing_everything_is_light():
    "Importing the package's modules pulls in neither torch's heavy friends nor insightface, draws nothing and seeds nothing."
    import subprocess
    modules = sorted(package_imports())
    code = ("import sys, numpy as np; before = np.random.get_state()[1].tolist()\n" + "\n".join(f"import {m}" for m in modules) +
            "\nassert np.random.get_state()[1].tolist() == before, 'numpy was seeded'"
            "\nheavy = [m for m in ('insightface', 'matplotlib.pyplot', 'papermill', 'lmdb', 'fastcore', 'nbdev') if m in sys.modules]\nassert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/paper").glob("*.ipynb")]), ids=lambda p: p.stem)
def test_page_is_fit_to_read(path):
    "Committed with outputs, small enough to open, no machine's paths, exported cells short."
    import nbformat
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert any(c.outputs for c in code), "no outputs: python tools/nb.py run"
    assert path.stat().st_size < 600_000, f"{path.stat().st_size / 1000:.0f} kB"
    assert not re.search(r"/(?:work|root|tmp/tmp)[/\w]", path.read_text()), "names a path of one machine"
    exported = [c.source for c in code if "#| export" in c.source]
    assert len(set(exported)) == len(exported), "an exported cell stands on the page twice"
    for cell in code:
        if "#| export" in cell.source:
            assert cell.source.count("\n") <= 60, cell.source[:80]


def test_makefile_and_pipeline_keep_the_same_memory():
    from hyperface.pipeline import MALLOC
    assert dict(re.findall(r"(?m)^export (MALLOC_\w+) \?= (\d+)$", (ROOT / "Makefile").read_text())) == MALLOC

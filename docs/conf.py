"""The site of the notebooks: Sphinx reads what tools/docs.py laid out. Nothing is executed, nothing is fetched."""
import configparser
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
_settings = configparser.ConfigParser(delimiters=["="])
_settings.read(ROOT / "settings.ini", encoding="utf-8")

project, author = _settings["DEFAULT"]["title"], _settings["DEFAULT"]["author"]
release = version = _settings["DEFAULT"]["version"]
extensions = ["myst_nb"]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = html_show_sourcelink = False
html_static_path = []
templates_path = []

nb_execution_mode = "off"                   # pages show the outputs they are committed with
nb_render_markdown_format = "myst"          # tables and equations in what cells show
myst_enable_extensions = ["amsmath", "dollarmath", "strikethrough"]
myst_dmath_allow_space = myst_dmath_allow_digits = False
myst_dmath_double_inline = True             # $$...$$ within a paragraph, too
myst_heading_anchors = 3
myst_update_mathjax = False
suppress_warnings = ["myst.header", "myst.strikethrough"]
html_math_renderer = "mathml"


def _mathml(latex: str, node, display: bool) -> str:
    "The equation as MathML, which browsers draw themselves; what cannot be converted is told and shown as code."
    from hyperface.report.page import math_html
    found = math_html(latex, display)
    if found.startswith("<code>"):
        logging.getLogger(__name__).warning("no MathML for %s", latex[:80], location=node)
    return found


def inline_math(self, node):
    self.body.append(_mathml(node.astext(), node, False))
    raise nodes.SkipNode


def display_math(self, node):
    anchor = "".join(f'<span id="{name}"></span>' for name in node["ids"])
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    self.body.append(f'<div class="equation" style="overflow-x:auto;overflow-y:hidden;padding:.4em 0">{anchor}{number}{_mathml(node.astext(), node, True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)

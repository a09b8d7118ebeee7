"""Sphinx's settings of the documentation site, which is built from the pages as they lie in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

project = "resist-lightning"
author = "The maintainers of resist-lightning"
release = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]

# The source folder is the whole repository, so that a link between two pages is good in both places.
root_doc = "docs/index"
include_patterns = [
    *("docs/**.md", "docs/notebooks/*.ipynb", "experiments/**.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autoclass_content = "both"  # the options of a strategy stand in the text of its constructor
autodoc_typehints = "description"
toc_object_entries = False  # each has a heading already
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = project
html_show_sphinx = False
html_additional_pages = {"index": "to_docs.html"}
templates_path = ["_templates"]

# Pages that are lists already would show a second one on a code host, so their part of the navigation is added here.
_CHILDREN = {"docs/decisions/README": "0*", "experiments/README": "*/README"}


def _add_children(_app: Sphinx, page: str, source: list[str]) -> None:
    if page in _CHILDREN:
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n{_CHILDREN[page]}\n```\n"


def _read_notebook(app: Sphinx, page: str, source: list[str]) -> None:
    if app.env.doc2path(page).suffix == ".ipynb":
        cells = json.loads(source[0])["cells"]
        source[0] = "\n\n".join(part for cell in cells for part in _as_markdown(cell))


def _as_markdown(cell: dict[str, Any]) -> list[str]:
    """A cell with the outputs that are saved with it: tables and pictures in HTML, the last value as text."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [text]
    parts = [f"```python\n{text}\n```"]
    for output in cell["outputs"]:
        data = {kind: "".join(lines) for kind, lines in output["data"].items()}
        if "text/html" in data:
            parts.append(f"```{{raw}} html\n{data['text/html']}\n```")
        elif "image/png" in data:
            picture = data["image/png"].replace("\n", "")
            parts.append(f'```{{raw}} html\n<img alt="" src="data:image/png;base64,{picture}">\n```')
        else:
            parts.append(f"```text\n{data['text/plain']}\n```")
    return parts


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read_notebook)
    app.connect("source-read", _add_children)

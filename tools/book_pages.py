"""What the pages of the book need beyond Jupyter Book; a Sphinx extension.

- An exported cell says where it is exported to, in place of its `#| export`.
- Pictures keep their width and give up their height, so that they shrink with the column.
- Scripts that no page uses, and the parts of MathJax that no formula asks for, are left out.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)
DIRECTIVE = re.compile(r"^#\|[^\n]*\n?", re.MULTILINE)
# All that a page of formulas loads: the program, its fonts, the rest of TeX's commands.
MATHJAX = ("tex-chtml.js", "output/chtml", "input/tex", "core.js", "loader.js", "startup.js")


def exported_to(source: Path) -> str:
    """The module that a notebook exports to, or nothing."""
    if source.suffix != ".ipynb":
        return ""
    for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if match := re.search(r"(?m)^#\|\s*default_exp\s+(\S+)", text):
            return f"memformer.{match[1]}"
    return ""


def label_exports(app: Sphinx, doctree: nodes.document) -> None:
    """Take directives out of the cells that are shown, and say in words what they did."""
    module = exported_to(Path(str(app.env.doc2path(app.env.docname))))
    for block in list(doctree.findall(nodes.literal_block)):
        text = block.rawsource or block.astext()
        if not text.lstrip().startswith("#|") or not isinstance(block.parent, nodes.container):
            continue
        exports = re.match(r"\s*#\|\s*exporti?\b", text) is not None
        code = DIRECTIVE.sub("", text, count=0).strip("\n")
        block.rawsource = code
        block.children = [nodes.Text(code)]
        block.children[0].parent = block
        if exports and module:
            words = nodes.inline("", f"exported to {module}")
            label = nodes.container("", words, classes=["exported-to"])
            block.parent.insert(block.parent.index(block), label)


def name_folds(app: Sphinx, doctree: nodes.document) -> None:
    """What is folded says what it is: a solution, the code of a drawing, the Colab cell."""
    for cell in doctree.findall(nodes.container):
        if "hide_mode" not in cell.attributes:
            continue
        code = next(iter(cell.findall(nodes.literal_block)), None)
        text = code.astext() if code is not None else ""
        what = "the code"
        if text.startswith("# Solution"):
            what = "the solution"
        elif "find_spec" in text:
            what = "the cell that installs the package in Colab"
        elif next(iter(cell.findall(nodes.image)), None) is not None:
            what = "the code of this figure"
        cell["prompt_show"], cell["prompt_hide"] = f"Show {what}", f"Hide {what}"


def number_figures(app: Sphinx, doctree: nodes.document) -> None:
    """`[Figure](#fig-name)`, a plain link in Colab, becomes its number on the page."""
    docname = app.env.docname
    for link in list(doctree.findall(nodes.reference)) + list(doctree.findall(pending_xref)):
        target = str(link.get("refid") or link.get("reftarget") or "").lstrip("#")
        if link.astext() != "Figure" or not target.startswith("fig-"):
            continue
        options = {"refdomain": "std", "reftype": "numref", "reftarget": target}
        words = nodes.literal("", "Figure", classes=["xref", "std", "std-numref"])
        number = pending_xref("", words, refdoc=docname, refexplicit=False, **options)
        number["refwarn"] = True
        link.replace_self(number)


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """A link to a file of the library opens it where it can be read, not as a download."""
    base = str(app.config.html_theme_options.get("repository_url", "")).rstrip("/")
    branch = app.config.html_theme_options.get("repository_branch", "main")
    for link in list(doctree.findall(download_reference)):
        target = str(link.get("reftarget", "")).replace("../", "")
        if base and target.endswith((".py", ".json", ".toml")):
            address = f"{base}/blob/{branch}/{target}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=address))


def free_heights(app: Sphinx, doctree: nodes.document) -> None:
    """A picture's height follows from its width, whatever the notebook says."""
    for image in doctree.findall(nodes.image):
        if str(image.get("width", "")).isdigit():
            image["width"] = f"{image['width']}px"
        image.attributes.pop("height", None)


def drop_scripts(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """No page runs its cells in place, so none needs Thebe, which declares its names twice."""

    def used(script: Any) -> bool:
        body = getattr(script, "attributes", {}).get("body") or ""
        return "thebe" not in (str(getattr(script, "filename", script)) + body).lower()

    for kind in ("script_files", "css_files"):
        if kind in context:
            context[kind] = [script for script in context[kind] if used(script)]


def drop_launchers(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """What Thebe leaves at the end of every page."""
    for raw in list(doctree.findall(nodes.raw)):
        if "thebe" in raw.astext().lower():
            raw.parent.remove(raw)


def slim(app: Sphinx, error: Exception | None) -> None:
    """Leave out what is copied and never asked for."""
    static = Path(app.outdir) / "_static"
    mathjax = static / "mathjax"
    if error is not None or not mathjax.is_dir():
        return
    for path in [p for p in mathjax.rglob("*") if p.is_file()]:
        if not path.relative_to(mathjax).as_posix().startswith(MATHJAX):
            path.unlink()
    for path in sorted((p for p in mathjax.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    for path in static.rglob("*.map"):
        path.unlink()
    for path in static.glob("*thebe*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", label_exports)
    app.connect("doctree-read", name_folds)
    app.connect("doctree-read", number_figures)
    app.connect("doctree-read", link_sources, priority=100)  # before downloads are collected
    app.connect("doctree-read", free_heights)
    app.connect("doctree-resolved", drop_launchers, priority=999)
    app.connect("html-page-context", drop_scripts, priority=999)
    app.connect("build-finished", slim, priority=999)
    own = zlib.crc32(Path(__file__).read_bytes())  # pages are read again when this file changes
    return {
        "version": "1",
        "env_version": own,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }

"""Run the chapters in place with stable diffs, keep the address in one place, measure the book.

python tools/chapters.py run [NOTEBOOK …]    execute; keep nothing that changes by itself
python tools/chapters.py address             copy the address of _config.yml into first cells
python tools/chapters.py measure             write data/book.json, and print what breaks a limit
python tools/chapters.py release             fail unless the address is a real one
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
MEASURED = ROOT / "data" / "book.json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PLACEHOLDER = "your_account"
HIDDEN = {"hide-input", "hide-cell", "remove-cell", "remove-input"}
INSTALL = """\
# Colab: install the package. Where it is installed already, this does nothing.
import importlib.util

if importlib.util.find_spec("memformer") is None:
    address = "git+{url}"
    if "{placeholder}" not in address:
        %pip install -q {{address}}
    if importlib.util.find_spec("memformer") is None:
        raise SystemExit(f"memformer could not be installed from {{address}}")"""


# --- running --------------------------------------------------------------------------------


def run(path: Path) -> None:
    """Execute one notebook, and write it back without timestamps and kernel details."""
    notebook, before = nbformat.read(path, as_version=4), os.times()
    where = {"metadata": {"path": path.parent}}
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=where, coalesce_streams=True
    ).execute()
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)
    after = os.times()  # of the kernel, which has ended; other work does not count
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    print(f"{path.name}: {spent:.0f} s of processor time")
    if path.parent == BOOK:
        table = stored()
        table.setdefault(path.stem, {})["seconds"] = round(spent)
        store(table)


# --- the address ----------------------------------------------------------------------------


def address() -> str:
    """The repository's address, from the one place where it stands."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", url):
        sys.exit(
            f"repository.url in _config.yml is {url!r}; https://host/owner/name is expected"
        )
    return str(url)


def first_cell(url: str) -> str:
    """The first code cell of every notebook: it installs the package, or stops and says so."""
    return INSTALL.format(url=url, placeholder=PLACEHOLDER)


def set_address(path: Path, url: str) -> None:
    """Make the first code cell of a notebook the one that installs from this address."""
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if "find_spec" not in cell.source:
        sys.exit(f"{path.name}: the first code cell is not the one that installs the package")
    if cell.source != first_cell(url):
        cell.source = first_cell(url)
        nbformat.write(notebook, path)


def release() -> None:
    """Stop unless readers elsewhere can install what the first cells name."""
    if PLACEHOLDER in address():
        sys.exit(
            f"repository.url in _config.yml is still the placeholder {address()}; put the "
            "repository's address there and run make address"
        )


# --- measuring ------------------------------------------------------------------------------


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def code_lines(cell: Any) -> int:
    """Lines that hold something, directives apart."""
    lines = cell.source.splitlines()
    return sum(bool(line.strip()) and not line.startswith("#|") for line in lines)


def visible(notebook: Any) -> list[Any]:
    """The code cells whose input a reader sees."""
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [cell for cell in code if cell.source.strip() and not tags(cell) & HIDDEN]


def shows_picture(cell: Any) -> bool:
    return any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))


def exercises(notebook: Any) -> tuple[int, int]:
    """How many exercises, `**1.** …` under `## Exercises`, and how many hidden solutions."""
    asked = solved = 0
    inside = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("## "):
                    inside = "exercises" in line.lower()
                asked += bool(inside and re.match(r"\*\*\d+\.", line))
        elif inside and cell.source.startswith("# Solution"):
            solved += "hide-cell" in tags(cell)
    return asked, solved


def has_head(text: str) -> bool:
    """Whether a page begins with a box of what it needs, how long it runs, what it gives."""
    begin = text.find("Before you begin")
    box = text[begin : begin + 700].lower()
    return begin >= 0 and all(word in box for word in ("need", "run", "export"))


def measure(path: Path) -> dict[str, Any]:
    """What a chapter is made of, counted."""
    return measured(nbformat.read(path, as_version=4))


def measured(notebook: Any) -> dict[str, Any]:
    """What a notebook is made of, counted."""
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    seen = visible(notebook)
    lines = sorted(code_lines(cell) for cell in seen) or [0]
    pictures = [cell for cell in notebook.cells if shows_picture(cell)]
    described = [c.metadata.get("mystnb", {}) for c in pictures]
    asked, solved = exercises(notebook)
    return {
        "words": len(text.split()),
        "visible": len(seen),
        "median": statistics.median(lines),
        "ninth": lines[max(0, -(-9 * len(lines) // 10) - 1)],
        "longest": lines[-1],
        "longest_unexported": max(
            (code_lines(c) for c in seen if not c.source.startswith("#| export")), default=0
        ),
        "drawings": sum("drawing" in tags(cell) for cell in pictures),
        "plots": sum("plot" in tags(cell) for cell in pictures),
        "pictures": len(pictures),
        "captions": sum(bool(d.get("figure", {}).get("caption")) for d in described),
        "alt": sum(len(d.get("image", {}).get("alt", "")) >= 30 for d in described),
        "exercises": asked,
        "solutions": solved,
        "head": has_head(text[:3000]),
    }


def complaints(found: dict[str, Any]) -> list[str]:
    """The limits of the book's design that a chapter breaks."""
    rules = [
        (1500 <= found["words"] <= 2800, f"{found['words']} words; 1,500 to 2,800"),
        (found["visible"] <= 30, f"{found['visible']} visible cells; at most 30"),
        (found["median"] <= 6, f"visible cells have a median of {found['median']} lines; 6"),
        (
            found["ninth"] <= 20,
            f"nine of ten visible cells reach {found['ninth']} lines; 20",
        ),
        (
            found["longest_unexported"] <= 20,
            f"a cell that exports nothing has {found['longest_unexported']} lines; 20",
        ),
        (found["longest"] <= 40, f"the longest visible cell has {found['longest']} lines; 40"),
        (3 <= found["drawings"] <= 5, f"{found['drawings']} drawings; 3 to 5"),
        (2 <= found["plots"] <= 5, f"{found['plots']} plots; 2 to 5"),
        (
            found["pictures"] == found["drawings"] + found["plots"],
            f"{found['pictures']} pictures, not all tagged as drawing or plot",
        ),
        (found["captions"] == found["pictures"], f"{found['captions']} captions"),
        (found["alt"] == found["pictures"], f"{found['alt']} alt texts of 30 letters or more"),
        (3 <= found["exercises"] <= 5, f"{found['exercises']} exercises; 3 to 5"),
        (found["solutions"] >= found["exercises"], f"{found['solutions']} hidden solutions"),
        (found["head"], "no box 'Before you begin' that says needs, time and exports"),
    ]
    return [words for holds, words in rules if not holds]


def chapters() -> list[Path]:
    return sorted(path for path in BOOK.glob("*.ipynb") if re.match(r"\d\d_", path.name))


def stored() -> dict[str, dict[str, Any]]:
    """What the file of measurements holds; nothing where there is none."""
    if not MEASURED.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text())
    return found


def store(table: dict[str, dict[str, Any]]) -> None:
    """Replace the file of measurements at once: chapters may run side by side."""
    partial = MEASURED.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    partial.replace(MEASURED)


def measure_all() -> None:
    """Write the table of the status page; seconds are processor time of the last run."""
    before = stored()
    table = {}
    for path in chapters():
        found = measure(path)
        table[path.stem] = found | {"seconds": before.get(path.stem, {}).get("seconds")}
        wrong = complaints(found)
        print(f"{path.stem}: {'; '.join(wrong) if wrong else 'fine'}")
    store(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "address", "measure", "check", "release"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every chapter")
    arguments = parser.parse_args()
    paths = [p.resolve() for p in arguments.notebooks] or sorted(BOOK.glob("*.ipynb"))
    if arguments.command == "release":
        release()
    elif arguments.command == "measure":
        measure_all()
    for path in paths:
        if arguments.command == "run":
            run(path)
        elif arguments.command == "address":
            set_address(path, address())
        elif arguments.command == "check":
            print(path.name, json.dumps(measure(path)), *complaints(measure(path)), sep="\n  ")


if __name__ == "__main__":
    main()

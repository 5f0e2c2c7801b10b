"""Run the chapters in place with stable diffs, and keep the repository's address in one place.

python tools/chapters.py run [NOTEBOOK …]    execute; keep nothing that changes by itself
python tools/chapters.py address             copy the address of _config.yml into first cells
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def run(path: Path) -> None:
    """Execute one notebook, and write it back without timestamps and kernel details."""
    notebook = nbformat.read(path, as_version=4)
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


def address() -> str:
    """The repository's address, from the one place where it stands."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", url):
        sys.exit(
            f"repository.url in _config.yml is {url!r}; https://host/owner/name is expected"
        )
    return str(url)


def set_address(path: Path, url: str) -> None:
    """Write the address into the install line of a notebook's first code cell."""
    text = path.read_text()
    path.write_text(re.sub(r'git\+https://[^\\"]+', f"git+{url}", text, count=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "address"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every chapter")
    arguments = parser.parse_args()
    for path in arguments.notebooks or sorted((ROOT / "book").glob("*.ipynb")):
        print(path.name, flush=True)
        if arguments.command == "run":
            run(path.resolve())
        else:
            set_address(path, address())


if __name__ == "__main__":
    main()

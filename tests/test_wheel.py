"""The built wheel holds the package, and a chapter runs from an empty folder with it alone.

`MEMFORMER_WHEEL_NOTEBOOKS` names those to run: `01,06`, or `all`; as a rule, all but one.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["memformer", "data", "pyproject.toml", "README.md", "LICENSE"]
CHOICE = os.environ.get("MEMFORMER_WHEEL_NOTEBOOKS", "quick")
SLOW = "09"  # it trains; nbval runs it anyway
NOTEBOOKS = [
    path
    for path in sorted((ROOT / "book").glob("*.ipynb"))
    if CHOICE == "all"
    or (CHOICE == "quick" and not path.stem.startswith(SLOW))
    or path.stem.startswith(tuple(CHOICE.split(",")))
]
# Takes out the finders by which an editable installation leads back to the source tree.
APART = """\
import sys
own = lambda finder: "__editable__" not in getattr(finder, "__module__", "")
sys.meta_path[:] = filter(own, sys.meta_path)
sys.path[:] = [p for p in sys.path if "__editable__" not in p and p.rstrip("/") != {root!r}]
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Built without network, from a copy, so that nothing is left in the tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        part = ROOT / name
        if part.is_dir():
            shutil.copytree(part, source / name, ignore=ignore)
        else:
            shutil.copy(part, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def machine(wheel, tmp_path_factory):
    """An environment where `memformer` comes from the unpacked wheel and from nowhere else."""
    packages, apart = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("apart")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (apart / "sitecustomize.py").write_text(APART.format(root=str(ROOT)), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMFORMER_")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return environment | {"PYTHONPATH": os.pathsep.join((str(apart), str(packages)))}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "memformer").glob("**/*.py")}
    assert len(modules) >= 10
    assert modules <= held
    assert {"memformer/py.typed", "memformer/book.mplstyle"} <= held
    records = {p.name for p in (ROOT / "data" / "runs").glob("*.json")}
    assert {
        Path(n).name for n in held if re.match(r"memformer/data/runs/.*\.json$", n)
    } == records
    weights = {p.name for p in (ROOT / "data" / "weights").glob("*.safetensors")}
    assert {Path(n).name for n in held if n.endswith(".safetensors")} == weights
    assert not [name for name in held if name.endswith((".ipynb", ".pyc"))]
    others = {name for name in held if not name.startswith("memformer/")}
    assert all(".dist-info/" in name for name in others)
    assert any(name.endswith("LICENSE") for name in others)


def ask(code, machine, folder):
    done = subprocess.run(
        [sys.executable, "-c", code], env=machine, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE = "import importlib.util as u; s = u.find_spec('memformer'); print(s and s.origin)"


def test_the_source_tree_is_out_of_reach(machine, tmp_path):
    """Without the unpacked wheel, `memformer` is not the one of this tree."""
    apart, packages = machine["PYTHONPATH"].split(os.pathsep)
    assert ask(WHERE, machine, tmp_path).startswith(packages)
    alone = ask(WHERE, machine | {"PYTHONPATH": apart}, tmp_path)
    assert not alone.startswith(str(ROOT / "memformer"))


def test_records_come_with_the_wheel(machine, tmp_path):
    code = "from memformer.files import data_folder as where\n"
    code += "from memformer.lab.records import record_names\nprint(where(), *record_names())"
    folder, *names = ask(code, machine, tmp_path).split()
    assert folder.startswith(machine["PYTHONPATH"].split(os.pathsep)[1])
    assert names == sorted(path.stem for path in (ROOT / "data" / "runs").glob("*.json"))


def test_the_style_of_the_book_comes_with_the_wheel(machine, tmp_path):
    code = "import matplotlib.pyplot as plt; plt.style.use('memformer.book'); print('fine')"
    assert ask(code, machine, tmp_path) == "fine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_runs_from_an_empty_folder(path, machine, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell("import memformer\nprint(memformer.__file__)")
    )
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=machine)  # a cell that fails raises, unless it is tagged to
    assert (
        notebook.cells[-1]
        .outputs[0]
        .text.startswith(machine["PYTHONPATH"].split(os.pathsep)[1])
    )
    assert not list(tmp_path.iterdir()), "the chapter left files behind"


def test_notebooks_were_chosen():
    assert NOTEBOOKS, f"no chapter begins with one of {CHOICE!r}"

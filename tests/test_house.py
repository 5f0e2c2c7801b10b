"""How the house is built: imports run one way, and nothing grows beyond what can be read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "memformer"
MECHANISM = {
    "modes",
    "config",
    "hub",
    "segments",
    "positions",
    "cache",
    "attention",
    "slots",
    "reader",
    "writer",
    "forgetting",
    "layers",
    "model",
    "again",
    "mrbp",
    "objectives",
}
# From the ground up: a wing imports from itself and from those before it.
ORDER = [
    {"settings", "checks", "files"},
    MECHANISM,
    {"rivals"},
    {"tasks"},
    {"streaming"},
    {"lab"},
    {"training"},
    {"cli"},
    {"__init__", "__main__"},
]
GENERATED = {"_modidx"}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.stem not in GENERATED)


def name_of(path, package=PACKAGE):
    """`memformer/lab/costs.py` → `("lab", "costs")`; a folder's own module has no last part."""
    parts = path.relative_to(package).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def imported(source, where):
    """Every module of the package that a source imports, also inside functions.

    `where` is the package the source stands in, as a tuple of names below `memformer`. What
    only a type checker imports does not count.
    """
    found, tree = set(), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ("memformer", *where)[: len(where) + 2 - node.level]
            inner = ".".join((*base, *([node.module] if node.module else [])))
            names = [inner] if node.module else [f"{inner}.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "memformer":
                names = [f"memformer.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {tuple(n.split(".")[1:]) for n in names if n.split(".")[0] == "memformer"}
    return found


def imports_of(path):
    where = path.relative_to(PACKAGE).parent.parts
    return imported(path.read_text(encoding="utf-8"), where)


def wing_of(name):
    """The number of the wing; None for a module that belongs to none."""
    return next((i for i, wing in enumerate(ORDER) if name[:1] and name[0] in wing), None)


def code_lines(source, node):
    """Lines of a class or function that hold something, decorators and docstring included."""
    begin = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return sum(bool(line.strip()) for line in source.splitlines()[begin - 1 : node.end_lineno])


# --- the instruments ------------------------------------------------------------------------


def test_every_way_to_import_is_seen():
    source = """
import memformer.lab.costs, os
from memformer.training import runs
from memformer import trace, modes
from .records import write
from ..model import Memformer
from .. import hub
def late():
    from memformer.tasks.recall import RecallTask
    import torch
if TYPE_CHECKING:
    from memformer.cli import main
"""
    assert imported(source, ("lab",)) == {
        ("lab", "costs"),
        ("training",),
        ("trace",),
        ("modes",),
        ("lab", "records"),
        ("model",),
        ("hub",),
        ("tasks", "recall"),
    }
    assert imported("from .writer import x\nfrom . import slots", ()) == {
        ("writer",),
        ("slots",),
    }


def test_lines_of_a_class_are_counted_without_empty_ones():
    source = '@frozen\nclass A:\n    """One."""\n\n    x = 1\n\n    def f(self): ...\n\ny = 2\n'
    assert code_lines(source, ast.parse(source).body[0]) == 5


# --- the rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_module_belongs_to_a_wing_and_imports_from_those_before(path):
    name = name_of(path)
    wing = wing_of(name)
    assert wing is not None, f"{path.name} is in no wing"
    for other in imports_of(path):
        there = wing_of(other)
        assert there is not None, f"imports {'.'.join(other) or 'memformer'}, in no wing"
        assert there <= wing, f"imports {'.'.join(other)}, from a wing after its own"


def test_nothing_in_a_wing_imports_the_whole_package():
    """`from memformer import x` would run every wing's imports; only the command may."""
    for path in MODULES:
        if name_of(path)[0] in ("cli", "__main__", "__init__"):
            continue
        wings = {other[0] for other in imports_of(path) if other}
        known = set().union(*ORDER[:-1])
        assert wings <= known, path


def test_the_mechanism_knows_nothing_of_training():
    for path in MODULES:
        if name_of(path)[0] in MECHANISM:
            others = {other[0] for other in imports_of(path)}
            assert others <= MECHANISM | ORDER[0], path


def test_no_two_modules_import_each_other_in_the_end():
    """Within a wing too there is an order: each module can be read after those it needs."""
    names = {name_of(path): imports_of(path) for path in MODULES}
    done, open_now = set(), []

    def visit(name):
        assert name not in open_now, " → ".join(".".join(n) for n in [*open_now, name])
        if name in done or name not in names:
            return
        open_now.append(name)
        for other in names[name]:
            if other != name:
                visit(other)
        open_now.pop()
        done.add(name)

    for name in names:
        if name != ("__init__",):
            visit(name)


def test_rivals_know_nothing_of_the_memformer():
    """They share segments, attention and replay, and none of the parts of the memory."""
    own = {"slots", "reader", "writer", "forgetting", "layers", "model"}
    for path in MODULES:
        if name_of(path)[0] == "rivals":
            assert not own & {other[0] for other in imports_of(path)}, path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_is_too_long_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = 250 if name_of(path)[0] in MECHANISM | {"rivals"} else 400
    assert lines <= most, f"{lines} lines; at most {most}"


# Chapters export these; the rest of the mechanism is ordinary and only linked to.
ORDINARY = {"modes", "config", "hub", "cache", "again", "layers", "positions"}
PRINTED = [p for p in MODULES if name_of(p)[0] in (MECHANISM - ORDINARY) | {"rivals"}]


@pytest.mark.parametrize("path", PRINTED, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_what_the_book_prints_fits_a_cell(path):
    """A class or function is one cell: at most 40 lines that hold something."""
    source = path.read_text(encoding="utf-8")
    kinds = (ast.ClassDef, ast.FunctionDef)
    long = {
        node.name: code_lines(source, node)
        for node in ast.parse(source).body
        if isinstance(node, kinds) and code_lines(source, node) > 40
    }
    assert not long

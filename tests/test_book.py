"""The book's sources: executed, described, linked, and as long as a chapter should be."""

import ast
import copy
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
PAGES = sorted([*BOOK.glob("*.md"), *NOTEBOOKS])
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))

sys.path.insert(0, str(ROOT / "tools"))
import chapters  # noqa: E402  (the tool that measures is the one that is tested)

INSTALL = chapters.first_cell(CONFIG["repository"]["url"])


def read(path):
    return nbformat.read(path, as_version=4)


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


def outputs(notebook):
    """Pairs of a code cell and one of its outputs."""
    return [(cell, out) for cell in cells(notebook, "code") for out in cell.outputs]


def prose(path):
    """The markdown of a page or of a notebook."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in cells(read(path), "markdown"))


# --- rules for a notebook: each gives the complaints about it -------------------------------


def executed(notebook):
    """Every cell was run once, from top to bottom, in one go."""
    counts = [c.execution_count for c in cells(notebook, "code") if c.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}"


def without_errors(notebook):
    """Errors stand only where they are the point."""
    for cell, out in outputs(notebook):
        if out.output_type == "error" and "raises-exception" not in tags(cell):
            yield f"{out.ename}: {out.evalue} in {cell.source[:60]!r}"


def without_warnings(notebook):
    for cell, out in outputs(notebook):
        if out.get("name") == "stderr":
            yield f"stderr {out.text[:60]!r} in {cell.source[:60]!r}"


def short_cells(notebook):
    """Nothing that is seen is longer than 40 lines, and only what is exported than 20."""
    for cell in chapters.visible(notebook):
        most = 40 if cell.source.startswith("#| export") else 20
        if (lines := chapters.code_lines(cell)) > most:
            yield f"{lines} lines in {cell.source[:60]!r}"


def plain_outputs(notebook):
    """Text and PNG only: nbval compares everything else, and Colab may not show it."""
    for cell, out in outputs(notebook):
        for kind in out.get("data", {}):
            if kind not in ("text/plain", "image/png"):
                yield f"{kind} in {cell.source[:60]!r}"


def alt_of(cell):
    return cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")


def described_pictures(notebook):
    """Alt text says what is to be seen, not that there is a plot."""
    shown = [cell for cell, out in outputs(notebook) if "image/png" in out.get("data", {})]
    alts = Counter(alt_of(cell) for cell in shown)
    for cell in shown:
        alt = alt_of(cell)
        if len(alt) < 30:
            yield f"alt text {alt!r} in {cell.source[:60]!r}"
        elif re.match(
            r"(?i)(an? |the )?(plot|figure|picture|image|graph|chart|diagram)\b", alt
        ):
            yield f"alt text begins {alt[:30]!r}"
        elif alts[alt] > 1:
            yield f"alt text twice: {alt[:30]!r}"


def described_markdown_pictures(notebook):
    yield from undescribed("\n\n".join(cell.source for cell in cells(notebook, "markdown")))


def undescribed(text):
    for match in re.finditer(r"!\[([^\]]*)\]", text):
        if len(match[1]) < 30:
            yield f"picture with alt text {match[1]!r}"
    for match in re.finditer(r"<img\b[^>]*>", text):
        if not re.search(r"""alt=["'][^"']{30,}""", match[0]):
            yield f"picture without alt text: {match[0]}"
    for match in re.finditer(r"[`:]{3,}\{(?:figure|image)\}[^\n]*\n((?::[^\n]*\n)*)", text):
        if not re.search(r"(?m)^:alt:\s*\S.{29,}", match[1]):
            yield f"picture without alt text: {match[0].splitlines()[0]}"


def colab_cell_first(notebook):
    """The first code cell installs the package, from the one address that _config.yml holds."""
    first = cells(notebook, "code")[0].source
    if first != INSTALL:
        yield f"the first code cell is {first!r}; {INSTALL!r} is expected"


def one_title(notebook):
    """`# Title`, then `> summary`, which becomes the module's docstring."""
    lines = [line for line in notebook.cells[0].source.splitlines() if line.strip()]
    if not (
        lines and lines[0].startswith("# ") and len(lines) > 1 and lines[1].startswith("> ")
    ):
        yield f"the page begins {lines[:2]}"
    titles = [
        line
        for cell in cells(notebook, "markdown")
        for line in re.sub(r"(?s)```.*?```", "", cell.source).splitlines()
        if line.startswith("# ")
    ]
    if len(titles) > 1:
        yield f"several titles: {titles}"


HERE = re.compile(r"(?<![\w.])/(work|tmp|root|home|Users|var|mnt)\b")


def without_paths(notebook):
    """No path of the machine on which it was run."""
    for cell in notebook.cells:
        texts = [cell.source]
        for out in cell.get("outputs", []):
            texts += [out.get("text", ""), *out.get("traceback", [])]
            texts.append(str(out.get("data", {}).get("text/plain", "")))
        for text in texts:
            if match := HERE.search(text):
                yield f"{text[match.start() : match.start() + 40]!r}"


RULES = (
    executed,
    without_errors,
    without_warnings,
    short_cells,
    plain_outputs,
    described_pictures,
    described_markdown_pictures,
    colab_cell_first,
    one_title,
    without_paths,
)


def within_limits(notebook):
    """The limits of a chapter: words, cells, lines, pictures, exercises, a box at its head."""
    yield from chapters.complaints(chapters.measured(notebook))


def solved_exercises(notebook):
    """Three to five exercises, `**1.** …`, each followed by its hidden solution."""
    numbers, solved, inside = [], [], False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("## "):
                    inside = line.strip() == "## Exercises"
                elif inside and (match := re.match(r"\*\*(\d+)\.", line)):
                    numbers.append(int(match[1]))
        elif inside and cell.source.startswith("# Solution"):
            if "hide-cell" not in tags(cell):
                yield f"a solution that is not hidden: {cell.source[:40]!r}"
            if numbers and numbers[-1] not in solved:
                solved.append(numbers[-1])
    if numbers != list(range(1, len(numbers) + 1)) or not 3 <= len(numbers) <= 5:
        yield f"exercises are numbered {numbers}; 1 to 3, 4 or 5 are asked for"
    if numbers != solved:
        yield f"exercises {numbers}, of which {solved} have a solution after them"


def numbered_figures(notebook):
    """Every picture has a name of its own, and what prose refers to is there."""
    names = [c.metadata.get("mystnb", {}).get("figure", {}).get("name") for c in notebook.cells]
    names = [name for name in names if name]
    for name, count in Counter(names).items():
        if count > 1 or not name.startswith("fig-"):
            yield f"figure {name!r} {count} times; one fig-… is expected"
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    for target in re.findall(r"\[Figure\]\(#([^)]*)\)", text):
        if target not in names:
            yield f"[Figure](#{target}) leads nowhere"
    if "{numref}" in text:
        yield "{numref} is shown raw in Colab; write [Figure](#fig-…)"


def closing(notebook):
    heads = re.findall(
        r"(?m)^## (.*)$", "\n".join(cell.source for cell in cells(notebook, "markdown"))
    )
    if heads[-2:] != ["Exercises", "Further reading"]:
        yield f"the last sections are {heads[-2:]}"


CHAPTER_RULES = (within_limits, numbered_figures, solved_exercises, closing)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_notebook(path, rule):
    notebook = read(path)
    nbformat.validate(notebook)
    complaints = list(rule(notebook))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("rule", CHAPTER_RULES, ids=lambda rule: rule.__name__)
def test_chapter(path, rule):
    complaints = list(rule(read(path)))
    assert not complaints, "\n".join(complaints)


# --- the rules themselves: a good notebook passes, and each notices what it is there for ----

ALT = "Three curves that fall to zero, the lowest of them first."


HEAD = "> **Before you begin.** *You need* chapter 1. *It runs* 20 s. *It exports* nothing."


def _shows(kind, number):
    """The metadata of a cell with a picture."""
    figure = {"caption": "**A figure.** It shows.", "name": f"fig-x-{number}"}
    image = {"alt": ALT + " " * number + str(number)}
    return {"tags": ["hide-input", kind], "mystnb": {"figure": figure, "image": image}}


def good_notebook():
    new = nbformat.v4
    word, picture = {"text/plain": "1"}, {"image/png": "aaaa"}
    notebook = new.new_notebook()
    notebook.cells = [
        new.new_markdown_cell(f"# Title\n\n> What it is.\n\n{HEAD}\n\n" + "word " * 2000),
        new.new_code_cell(INSTALL, metadata={"tags": ["hide-input"]}),
        new.new_code_cell("1", outputs=[new.new_output("execute_result", data=word)]),
        new.new_code_cell(
            "plt.show()",
            metadata=_shows("drawing", 0),
            outputs=[new.new_output("display_data", data=picture)],
        ),
        *(new.new_code_cell(f"{i}") for i in range(12)),
        *(
            new.new_code_cell(
                "plt.show()",
                metadata=_shows("plot" if i > 2 else "drawing", i),
                outputs=[new.new_output("display_data", data=picture)],
            )
            for i in range(1, 5)
        ),
        new.new_markdown_cell("[Figure](#fig-x-1)\n\n## Exercises\n\n**1.** Why?"),
        *_solution(1),
        new.new_markdown_cell("**2.** And why?"),
        *_solution(2),
        new.new_markdown_cell("**3.** Really?"),
        *_solution(3),
        new.new_markdown_cell(f"## Further reading\n\n![{ALT}](x.png)"),
    ]
    for count, cell in enumerate(cells(notebook, "code"), 1):
        cell.execution_count = count
    return notebook


def _solution(number):
    cell = nbformat.v4.new_code_cell(f"# Solution to exercise {number}\n1")
    cell.metadata["tags"] = ["hide-cell"]
    return [cell]


def _output(kind, **fields):
    return lambda nb: nb.cells[2].outputs.append(nbformat.v4.new_output(kind, **fields))


def _set(index, **fields):
    return lambda nb: nb.cells[index].update(fields)


def _alt(text):
    return lambda nb: nb.cells[3].metadata.mystnb.image.update(alt=text)


def _twice(notebook):
    notebook.cells[4] = copy.deepcopy(notebook.cells[3])


BREAKS = [
    (executed, _set(4, execution_count=None)),
    (executed, _set(4, execution_count=9)),
    (without_errors, _output("error", ename="E", evalue="e", traceback=[])),
    (without_warnings, _output("stream", name="stderr", text="UserWarning")),
    (short_cells, _set(4, source="1\n" * 40 + "1")),
    (plain_outputs, _output("display_data", data={"image/svg+xml": "<svg/>"})),
    (plain_outputs, _output("display_data", data={"text/html": "<b/>", "text/plain": ""})),
    (described_pictures, _alt("")),
    (described_pictures, _alt("Plot of three curves that fall to zero.")),
    (described_pictures, _alt("A figure of three curves that fall to zero.")),
    (described_pictures, lambda nb: nb.cells[3].metadata.pop("mystnb")),
    (described_pictures, _twice),
    (described_markdown_pictures, _set(-1, source="![](x.png)")),
    (described_markdown_pictures, _set(-1, source='<img src="x.png">')),
    (described_markdown_pictures, _set(-1, source=":::{figure} x.png\n:name: x\n\nText\n:::")),
    (colab_cell_first, _set(1, source=chapters.first_cell("https://github.com/other/other"))),
    (colab_cell_first, lambda nb: nb.cells.pop(1)),
    (one_title, _set(0, source="# Title\n\nWords")),
    (one_title, _set(-1, source="# Another title")),
    (without_paths, _set(4, source="open('/tmp/x')")),
    (without_paths, _output("stream", name="stdout", text="in /home/me/x.py")),
    (within_limits, _set(0, source=f"# Title\n\n> Short.\n\n{HEAD}")),
    (within_limits, _set(0, source=f"# Title\n\n{HEAD}" + "word " * 2801)),
    (within_limits, _set(0, source="# Title\n\n> No box." + "word " * 2000)),
    (within_limits, lambda nb: nb.cells.extend([nbformat.v4.new_code_cell("1")] * 18)),
    (within_limits, lambda nb: [c.update(source="1\n" * 7) for c in nb.cells[4:16]]),
    (within_limits, lambda nb: [c.update(source="1\n" * 21) for c in nb.cells[4:7]]),
    (within_limits, _set(4, source="1\n" * 21)),
    (within_limits, _set(4, source="#| export\n" + "1\n" * 41)),
    (within_limits, lambda nb: nb.cells[3].metadata.update(tags=["hide-input"])),
    (within_limits, lambda nb: nb.cells[3].metadata.mystnb.pop("figure")),
    (within_limits, lambda nb: nb.cells[3].metadata.mystnb.pop("image")),
    (within_limits, lambda nb: nb.cells.pop(3)),
    (within_limits, lambda nb: nb.cells.pop(19)),
    (numbered_figures, lambda nb: nb.cells[3].metadata.mystnb.figure.update(name="fig-x-1")),
    (numbered_figures, lambda nb: nb.cells[3].metadata.mystnb.figure.update(name="x")),
    (numbered_figures, _set(-1, source="[Figure](#fig-none)")),
    (numbered_figures, _set(-1, source="{numref}`fig-x-1`")),
    (solved_exercises, lambda nb: nb.cells.pop(-2)),
    (solved_exercises, lambda nb: nb.cells[-2].metadata.pop("tags")),
    (solved_exercises, lambda nb: [nb.cells.pop(-2) for _ in range(2)]),
    (closing, lambda nb: nb.cells.pop(-1)),
]


@pytest.mark.parametrize("rule", [*RULES, *CHAPTER_RULES], ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule):
    notebook = good_notebook()
    nbformat.validate(notebook)
    assert not list(rule(notebook))
    assert any(rule is broken for broken, _ in BREAKS)


@pytest.mark.parametrize(("rule", "damage"), BREAKS)
def test_the_rules_notice(rule, damage):
    notebook = good_notebook()
    damage(notebook)
    assert list(rule(notebook))


# --- links and citations --------------------------------------------------------------------


def links(text):
    """Targets of links and pictures in markdown, code left out."""
    text = re.sub(r"(?s)(```|~~~).*?\1", "", text)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(\s*<?([^()\s>]+(?:\([^()\s]*\))?)>?[^()]*\)", text)
    found += re.findall(r"""<(?:a|img)\b[^>]*?(?:href|src)=["']([^"']+)""", text)
    return found + re.findall(r"(?m)^\[[^\]^]+\]:\s*(\S+)", text)


def slugs(path):
    """Anchors of a page: as Jupyter Book makes them from headings, and names of figures."""
    found = set(figure_names(path))
    for title in re.findall(r"(?m)^#{1,6} (.+?)\s*$", prose(path)):
        plain = re.sub(r"[`*_]|\$", "", title).lower()
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found | set(re.findall(r"(?m)^\(([\w-]+)\)=", prose(path)))


def figure_names(path):
    """What the pictures of a notebook are called."""
    if path.suffix != ".ipynb":
        return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    figures = [c["metadata"].get("mystnb", {}).get("figure", {}) for c in cells]
    return [figure["name"] for figure in figures if "name" in figure]


def broken_links(text, page):
    for target in links(text):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and file.suffix in (".md", ".ipynb") and anchor not in slugs(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    assert not list(broken_links(prose(page), page))


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
)
def test_links_of_other_texts_lead_somewhere(name):
    page = ROOT / name
    assert not list(broken_links(page.read_text(encoding="utf-8"), page))
    assert not list(undescribed(page.read_text(encoding="utf-8")))


def test_links_that_lead_nowhere_are_noticed():
    text = "[a](nowhere.ipynb) ![b](none.png) [c](#no-heading) [d](https://x.org/y) [e][e]"
    text += "\n\n[e]: f.md"
    assert len(list(broken_links(text, CHAPTERS[0]))) == 4
    assert list(broken_links("[Figure](#fig-nobody-drew-this)", CHAPTERS[0]))
    assert not list(broken_links(f"[a]({CHAPTERS[0].name}) `[b](none)`", CHAPTERS[0]))
    assert links("[a](b.md) and [c](d.md#e 'title')") == ["b.md", "d.md#e"]


def cited(text):
    roles = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
    return {key.strip() for role in roles for key in role.split(",")}


def test_citations_are_in_the_bibliography():
    entries = re.findall(r"(?m)^\s*@\w+\{\s*([^,\s]+)", (BOOK / "references.bib").read_text())
    assert not [key for key, times in Counter(entries).items() if times > 1]
    missing = {page.name: keys - set(entries) for page in PAGES if (keys := cited(prose(page)))}
    assert missing, "no page cites anything"
    assert not {page: keys for page, keys in missing.items() if keys}
    assert cited("see {cite}`a, b` and {cite:t}`c`") == {"a", "b", "c"}


# --- the tree -------------------------------------------------------------------------------


def files_of(toc):
    """Every `file` and `root` of a table of contents, however deep."""
    if isinstance(toc, list):
        return [file for entry in toc for file in files_of(entry)]
    if isinstance(toc, dict):
        named = [toc[key] for key in ("root", "file") if key in toc]
        return named + [file for value in toc.values() for file in files_of(value)]
    return []


def test_the_table_of_contents_is_the_book():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = files_of(toc)
    assert len(listed) == len(set(listed))
    sources = {}
    for name in listed:
        found = [p for s in ("", ".ipynb", ".md") if (p := ROOT / f"{name}{s}").is_file()]
        assert len(found) == 1, f"{name} in _toc.yml is {found}"
        sources[name] = found[0]
    assert sorted(sources.values()) == sorted(PAGES)
    in_order = [path for path in sources.values() if path in CHAPTERS]
    assert in_order == CHAPTERS
    assert [path.name[:2] for path in CHAPTERS] == [
        f"{n:02d}" for n in range(1, len(CHAPTERS) + 1)
    ]


def test_only_a_real_address_is_released(monkeypatch):
    monkeypatch.setattr(
        chapters, "address", lambda: "https://github.com/your_account/memformer"
    )
    with pytest.raises(SystemExit, match="placeholder"):
        chapters.release()
    monkeypatch.setattr(chapters, "address", lambda: "https://github.com/someone/memformer")
    chapters.release()


def run_first_cell(monkeypatch, url, installs):
    """Run the first cell where the package is missing; `%pip` is a call that may install it."""
    found, asked = [False], []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace() if found[0] else None
    )

    def pip(address):
        asked.append(address)
        found[0] = installs

    code = re.sub(r"%pip install -q \{(\w+)\}", r"pip(\1)", chapters.first_cell(url))
    exec(code, {"pip": pip})
    return asked


def test_the_first_cell_installs_or_stops_with_a_sentence(monkeypatch):
    real = "https://github.com/someone/memformer"
    assert run_first_cell(monkeypatch, real, True) == [f"git+{real}"]
    with pytest.raises(SystemExit, match=f"could not be installed from git.{real}"):
        run_first_cell(monkeypatch, real, False)
    with pytest.raises(SystemExit, match="your_account"):  # without trying
        run_first_cell(monkeypatch, "https://github.com/your_account/memformer", True)


def test_the_settings_that_the_book_relies_on():
    assert CONFIG["execute"]["execute_notebooks"] == "cache"
    assert CONFIG["execute"].get("allow_errors", False) is False
    assert CONFIG["execute"]["stderr_output"] == "error"
    assert CONFIG["execute"]["timeout"] >= 600
    assert CONFIG["only_build_toc_files"] is True
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", CONFIG["repository"]["url"])
    assert CONFIG["repository"]["branch"] == "main"
    assert CONFIG["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    assert {"amsmath", "colon_fence", "dollarmath"} <= set(
        CONFIG["parse"]["myst_enable_extensions"]
    )
    for bibliography in CONFIG["bibtex_bibfiles"]:
        assert (ROOT / bibliography).is_file()


def test_the_address_stands_in_one_place():
    """Nothing but _config.yml and the install cells names the repository."""
    url = CONFIG["repository"]["url"]
    for path in sources_of_the_tree():
        if path.name == "_config.yml" or path.suffix == ".ipynb":
            continue
        assert url not in path.read_text(encoding="utf-8"), f"{path.name} holds the address"
    for path in NOTEBOOKS:
        assert path.read_text(encoding="utf-8").count(url) == 1, path.name


LEFT_OUT = re.compile(r"^(\..+|_build|build|dist|__pycache__|.+\.egg-info|venv|env)$")


def tree(folder=ROOT):
    """Every file of the repository, built and hidden ones left out."""
    for path in sorted(folder.iterdir()):
        if LEFT_OUT.match(path.name):
            continue
        if path.is_dir():
            yield from tree(path)
        else:
            yield path


def sources_of_the_tree():
    kinds = {".md", ".ipynb", ".py", ".toml", ".yml", ".cff", ".txt", ".css", ".json", ".bib"}
    return [path for path in tree() if path.suffix in kinds and path.parent.name != "tests"]


def test_no_file_names_a_path_of_this_machine():
    found = {}
    for path in sources_of_the_tree():
        if path.suffix != ".ipynb":  # notebooks have a rule of their own, which knows pictures
            text = path.read_text(encoding="utf-8")
            if match := HERE.search(text):
                found[path.name] = text[match.start() : match.start() + 40]
    assert not found
    assert HERE.search("in /tmp/x")
    assert not HERE.search("https://example.org/work/tmp and book/tmp")


def test_no_file_is_large():
    large = {p.name: p.stat().st_size for p in tree() if p.stat().st_size > 3_000_000}
    assert not large


def test_every_module_has_one_chapter_and_every_name_one_module():
    """What one chapter exports, no other redefines."""
    owners, names = Counter(), Counter()
    for path in sorted((ROOT / "memformer").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "AUTOGENERATED" not in text or path.name == "_modidx.py":
            continue
        owners[re.search(r"File to edit: (\S+)\.ipynb", text)[1]] += 1
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names.update(ast.literal_eval(node.value))
    assert len(owners) >= 8
    assert not [owner for owner, modules in owners.items() if modules > 1]
    assert not [name for name, modules in names.items() if modules > 1]


def test_no_later_chapter_redefines_what_an_earlier_one_exports():
    exported = {}
    for path in CHAPTERS:
        for cell in cells(read(path), "code"):
            source = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source)
            here = "#| export" in source
            for node in ast.parse(source).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    owner = exported.get(node.name, path)
                    assert owner == path, f"{path.name} redefines {node.name} of {owner.name}"
                    if here:
                        exported[node.name] = path
    assert len(exported) > 20

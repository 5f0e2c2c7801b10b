"""The pages, built here: links and anchors, pictures, launch buttons, and the width of a phone.

They show the outputs that the chapters are stored with. nbval runs the chapters and compares.
"""

import contextlib
import html
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "_build" / "stored"
BUILT = OUTPUT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SOURCES = [*NOTEBOOKS, *sorted((ROOT / "book").glob("*.md"))]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """What the tests ask of one HTML file."""

    def __init__(self, path, text=None):
        super().__init__()
        self.path, self.ids, self.links, self.images, self.metas = path, set(), [], [], []
        self.feed(path.read_text(encoding="utf-8") if text is None else text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        self.links += [attributes[key] for key in ("href", "src") if attributes.get(key)]
        if tag == "img":
            self.images.append(attributes)
        if tag == "meta":
            self.metas.append(attributes)

    @cached_property
    def refresh(self):
        """Where the page sends its reader at once, if it does."""
        for meta in self.metas:
            if (meta.get("http-equiv") or "").lower() == "refresh":
                return meta["content"].split("url=")[1]
        return None


@pytest.fixture(scope="module")
def pages():
    """Every page, by its path."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    config = OUTPUT / "_config.yml"
    unexecuted = CONFIG | {"execute": {"execute_notebooks": "off"}}
    unexecuted["sphinx"] = CONFIG["sphinx"] | {
        "local_extensions": {
            name: str(ROOT / path)
            for name, path in CONFIG["sphinx"]["local_extensions"].items()
        }
    }
    config.write_text(yaml.safe_dump(unexecuted), encoding="utf-8")
    command = [Path(sys.executable).parent / "jupyter-book", "build", ".", "-W", "--keep-going"]
    command += ["--config", config, "--path-output", OUTPUT, "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [p for p in sorted(BUILT.rglob("*.html")) if "_static" not in p.parts]
    return {path: Page(path) for path in files}


def test_every_source_has_its_page(pages):
    for source in SOURCES:
        assert BUILT / source.relative_to(ROOT).with_suffix(".html") in pages, source.name


# --- links ----------------------------------------------------------------------------------


def dead_links(page, pages):
    """Links within the book that lead to no file, or to no place in it."""
    targets = [*page.links, *([page.refresh] if page.refresh else [])]
    for link in targets:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        file = page.path
        if parts.path:
            file = Path(os.path.normpath(page.path.parent / unquote(parts.path)))
        if not file.is_file():
            yield f"{link}: no such file"
        elif (
            parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids
        ):
            yield f"{link}: no such place"


def test_every_link_within_the_book_leads_somewhere(pages):
    dead = {
        p.name: found for p, page in pages.items() if (found := list(dead_links(page, pages)))
    }
    assert not dead
    assert sum(len(page.links) for page in pages.values()) > 100


def test_dead_links_are_noticed(pages):
    path = BUILT / "book" / "intro.html"
    known = next(iter(pages[path].ids))
    page = Page(
        path,
        f'<a href="nowhere.html"></a><a href="#nowhere"></a><a href="../index.html#no"></a>'
        f'<img src="no.png"><a href="https://example.org/no"></a>'
        f'<a href="intro.html#{known}"></a>',
    )
    assert len(list(dead_links(page, pages))) == 4


# --- pictures -------------------------------------------------------------------------------


def undescribed(page):
    return [image for image in page.images if not (image.get("alt") or "").strip()]


def test_every_picture_has_alt_text(pages):
    missing = {p.name: found for p, page in pages.items() if (found := undescribed(page))}
    assert not missing
    assert sum(len(page.images) for page in pages.values()) > 20
    assert undescribed(Page(BUILT, '<img src="a.png"><img src="b.png" alt=" ">')) != []


def test_alt_text_of_a_chapter_reaches_its_page(pages):
    """myst-nb takes it from the cell's metadata; without, it would write the file's name."""
    for source in NOTEBOOKS:
        page = pages[BUILT / source.relative_to(ROOT).with_suffix(".html")]
        shown = {re.sub(r"\s+", " ", html.unescape(i.get("alt") or "")) for i in page.images}
        for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
            if any("image/png" in out.get("data", {}) for out in cell.get("outputs", [])):
                alt = cell["metadata"]["mystnb"]["image"]["alt"]
                assert re.sub(r"\s+", " ", alt).strip() in shown, f"{source.name}: {alt[:60]}"


# --- cells and figures ----------------------------------------------------------------------


def text_of(page):
    return page.path.read_text(encoding="utf-8")


def test_no_page_shows_a_directive_and_every_exported_cell_says_where_it_goes(pages):
    for source in NOTEBOOKS:
        shown = text_of(pages[BUILT / source.relative_to(ROOT).with_suffix(".html")])
        words = html.unescape(re.sub(r"<[^>]+>", "", shown))
        assert not re.search(r"(?m)^#\|\s", words), source.name
        code = json.loads(source.read_text(encoding="utf-8"))["cells"]
        exports = [
            cell
            for cell in code
            if "".join(cell["source"]).startswith("#| export\n")
            and "remove-cell" not in cell["metadata"].get("tags", [])
        ]
        assert shown.count('class="exported-to') == len(exports), source.name


def test_figures_are_numbered_and_references_to_them_too(pages):
    numbers = set()
    for source in NOTEBOOKS:
        shown = text_of(pages[BUILT / source.relative_to(ROOT).with_suffix(".html")])
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        named = sum("figure" in c["metadata"].get("mystnb", {}) for c in cells)
        here = re.findall(r'caption-number">Figure ([\d.]+) ', shown)
        assert len(here) == named, source.name
        assert not numbers & set(here), source.name
        numbers |= set(here)
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        asked = len(re.findall(r"\[Figure\]\(#fig-", text))
        assert len(re.findall(r"std-numref\">Figure [\d.]+<", shown)) == asked, source.name


def test_no_page_loads_what_no_page_uses(pages):
    for path, page in pages.items():
        assert "thebe" not in text_of(page).lower(), path.name
    size = sum(p.stat().st_size for p in (BUILT / "_static").rglob("*") if p.is_file())
    assert size < 10e6
    assert (BUILT / "_static" / "mathjax" / "tex-chtml.js").is_file()


# --- launch buttons -------------------------------------------------------------------------


def colab_address(source):
    owner_and_name = urlsplit(CONFIG["repository"]["url"]).path.strip("/")
    branch, base = CONFIG["repository"]["branch"], CONFIG["launch_buttons"]["colab_url"]
    return f"{base}/github/{owner_and_name}/blob/{branch}/{source.relative_to(ROOT).as_posix()}"


def test_every_notebook_opens_in_colab_from_the_address_in_the_config(pages):
    for source in NOTEBOOKS:
        page = pages[BUILT / source.relative_to(ROOT).with_suffix(".html")]
        launch = [link for link in page.links if "colab" in urlsplit(link).netloc]
        assert launch == [colab_address(source)], f"{source.name} has launch buttons {launch}"


def test_every_page_leads_to_the_repository(pages):
    for source in SOURCES:
        page = pages[BUILT / source.relative_to(ROOT).with_suffix(".html")]
        assert CONFIG["repository"]["url"] in page.links, source.name


# --- a phone --------------------------------------------------------------------------------

PHONE, DESK = 360, 1280
MEASURE = """<!doctype html><title>measure</title><script>
const results = [];
async function measure(url, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.src = url;
  await new Promise(done => { frame.onload = done; document.documentElement.append(frame); });
  const page = frame.contentDocument, root = page.documentElement;
  await page.fonts.ready;
  const math = frame.contentWindow.MathJax;
  if (math && math.startup) await math.startup.promise;
  await new Promise(done => setTimeout(done, 100));
  const scrolls = element => {  // inside a box that scrolls by itself?
    for (let e = element.parentElement; e && e !== page.body; e = e.parentElement)
      if (frame.contentWindow.getComputedStyle(e).overflowX !== "visible") return true;
    return false;
  };
  const content = page.querySelector("article") || page.body;  // side bars wait out of sight
  const wide = [...content.querySelectorAll("*")].filter(
    e => e.getBoundingClientRect().right > width + 1 && !scrolls(e));
  const view = frame.contentWindow, folded_in = "details:not([open])";
  const shown = e => e.getClientRects().length > 0 && !e.closest(folded_in);
  view.dispatchEvent(new Event("resize"));
  const PARTS = "img, table, pre, mjx-container[display]";
  const parts = [...content.querySelectorAll(PARTS)].filter(shown);
  const cut = parts.filter(e => {  // beyond the screen, and no box around it scrolls
    if (e.getBoundingClientRect().right <= width + 1) return false;
    for (let b = e.parentElement; b && b !== page.body; b = b.parentElement)
      if (/auto|scroll/.test(view.getComputedStyle(b).overflowX)) return false;
    return true;
  });
  const clipped = parts.filter(e => e.tagName !== "IMG" && e.scrollWidth > e.clientWidth + 2 &&
    !/auto|scroll/.test(view.getComputedStyle(e).overflowX));
  const silent = parts.filter(e => e.tagName !== "IMG" && e.scrollWidth > e.clientWidth + 2 &&
    !e.classList.contains("scrolls-sideways"));
  view.dispatchEvent(new Event("beforeprint"));
  const folded = content.querySelectorAll("details:not([open]), .toggle-hidden").length;
  view.dispatchEvent(new Event("afterprint"));
  const open = content.querySelectorAll("details[open]").length;
  const short = list => list.slice(0, 4).map(e => e.outerHTML.slice(0, 120));
  const broken = [...page.images].filter(
    i => i.src.startsWith(location.origin) && !i.naturalWidth);
  results.push({url, width, page: Math.max(root.scrollWidth, page.body.scrollWidth),
    wide: short(wide), cut: short(cut), clipped: short(clipped), silent: short(silent),
    folded, open, modes: [root.dataset.mode, root.dataset.theme],
    broken: broken.map(i => i.src)});
  frame.remove();
}
(async () => {
  for (const width of WIDTHS) for (const url of PAGES) await measure(url, width);
  await fetch("/__results__", {method: "POST", body: JSON.stringify(results)});
})();
</script>"""
FORGED = {
    "/__fits__.html": b"<!doctype html><meta charset=utf-8><p>A line of text.",
    "/__wide__.html": b"<!doctype html><meta charset=utf-8><div style='width:900px'>x</div>"
    b"<img alt='none' src='/no-such-picture.png'><table style='width:800px'><td>x</table>"
    b"<pre style='width:200px;overflow-x:auto'>" + b"x" * 300 + b"</pre>",
}


class Server(http.server.ThreadingHTTPServer):
    """Serves the built book and what the measurement needs, and waits for its results."""

    def __init__(self, urls, widths):
        script = MEASURE.replace("WIDTHS", json.dumps(widths)).replace(
            "PAGES", json.dumps(urls)
        )
        self.forged = FORGED | {"/__measure__.html": script.encode()}
        self.results, self.done = None, threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments):
        super().__init__(*arguments, directory=str(BUILT))

    def do_GET(self):
        if (body := self.server.forged.get(self.path)) is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        self.server.results = json.loads(self.rfile.read(size))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def browser(url, profile):
    """A headless Chromium that can reach this machine only; ended with its children."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-dev-shm-usage", "--remote-debugging-port=0", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command += [f"--user-data-dir={profile}", "--window-size=1400,1000", url]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measured(urls, widths, profile):
    """How wide each page is in a frame of each width, as Chromium lays it out."""
    with Server(urls, widths) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with browser(f"http://127.0.0.1:{server.server_port}/__measure__.html", profile):
                assert server.done.wait(300), "Chromium sent no measurements"
        finally:
            server.shutdown()
        return server.results


def estimated(urls, widths):
    """Without Chromium: fixed widths in the markup that no phone can show."""
    results = []
    for url in urls:
        text = FORGED.get(url, b"").decode() or (BUILT / url[1:]).read_text(encoding="utf-8")
        sizes = re.findall(
            r"""<(?:div|p|img|table|section)\b[^>]*?width[=:]["']?\s*(\d+)""", text
        )
        images = re.findall(r"""<img\b[^>]*src=["']([^"':]+)["']""", text)
        base = (BUILT / url[1:]).parent
        lost = [i for i in images if not (base / unquote(i.lstrip("/"))).is_file()]
        for width in widths:
            results.append(
                {"url": url, "width": width, "page": max([width, *map(int, sizes)]), "wide": []}
                | {"broken": lost}
            )
    return results


@pytest.fixture(scope="module")
def widths(pages, tmp_path_factory):
    """Measurements by page and width."""
    kept = [p for p, page in pages.items() if not page.refresh]
    urls = [*FORGED, *(f"/{path.relative_to(BUILT).as_posix()}" for path in kept)]
    if CHROMIUM:
        results = measured(urls, [PHONE, DESK], tmp_path_factory.mktemp("profile"))
    else:
        results = estimated(urls, [PHONE, DESK])
    assert len(results) == 2 * len(urls)
    return {(row["url"], row["width"]): row for row in results}


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_no_page_scrolls_sideways(widths, width):
    rows = [row for (url, at), row in widths.items() if at == width and url not in FORGED]
    too_wide = [row for row in rows if row["page"] > width + 1 or row["wide"]]
    assert not too_wide


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@needs_chromium
@pytest.mark.parametrize("kind", ["cut", "clipped", "silent"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_what_is_wider_than_the_screen_scrolls_in_a_box_that_shows_it(widths, width, kind):
    """Pictures, formulas, tables and outputs: none cut off, none that scrolls without a cue."""
    found = {u: row[kind] for (u, at), row in widths.items() if at == width and row.get(kind)}
    assert not {url: rows for url, rows in found.items() if url not in FORGED}


@needs_chromium
def test_a_picture_that_is_cut_and_a_table_that_scrolls_silently_are_noticed(widths):
    row = widths["/__wide__.html", PHONE]
    assert row["cut"]
    assert row["silent"]


@needs_chromium
def test_printing_opens_what_is_folded_and_closes_it_again(widths):
    rows = {url: row for (url, at), row in widths.items() if at == DESK and url not in FORGED}
    assert not {url: row["folded"] for url, row in rows.items() if row["folded"]}
    assert not {url: row["open"] for url, row in rows.items() if row["open"]}


@needs_chromium
def test_a_page_knows_its_colours(widths):
    for (url, _), row in widths.items():
        if url not in FORGED:
            assert row["modes"][0] in ("auto", "light", "dark"), url


def test_every_picture_is_shown(widths):
    assert not {
        u: row["broken"] for (u, _), row in widths.items() if row["broken"] and u not in FORGED
    }


def test_a_wide_page_and_a_lost_picture_are_noticed(widths):
    assert widths["/__wide__.html", PHONE]["page"] >= 900
    assert bool(widths["/__wide__.html", PHONE]["wide"]) is bool(CHROMIUM)
    assert widths["/__wide__.html", PHONE]["broken"]
    assert widths["/__fits__.html", PHONE]["page"] <= PHONE + 1


def test_without_chromium_a_wide_page_is_noticed_too():
    rows = {row["url"]: row for row in estimated([*FORGED], [PHONE])}
    assert rows["/__wide__.html"]["page"] == 900
    assert rows["/__wide__.html"]["broken"] == ["/no-such-picture.png"]
    assert rows["/__fits__.html"]["page"] == PHONE


def test_pages_tell_a_phone_how_wide_they_are(pages):
    for path, page in pages.items():
        if not page.refresh:
            views = [m.get("content") or "" for m in page.metas if m.get("name") == "viewport"]
            assert any("width=device-width" in view for view in views), path.name

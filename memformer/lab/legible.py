"""Whether a figure can be read on a phone: size of its letters, words over words, words cut off."""

from __future__ import annotations

from itertools import combinations
from typing import cast

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

PHONE = 358.0  # pixels of a column on a phone 390 wide
WIDEST = 6.0  # inches
SMALLEST = 7.0  # pixels of letters on a phone


def texts(figure: Figure) -> list[Text]:
    """The words of a figure that are drawn."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            away = [k for k in ticks if not low - slack <= k.get_loc() <= high + slack]
            for tick in away if axes.axison else ticks:
                hidden |= {tick.label1, tick.label2}
            if not axes.axison:
                hidden |= {axis.label, axis.get_offset_text()}
    found = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible()]
    return [t for t in found if t.get_text().strip() and t not in hidden]


def smallest_text(figure: Figure) -> float:
    """The size in pixels of the smallest words of a figure, shown on a phone 390 pixels wide.

    Indices in formulas are smaller than their letter and do not count. Infinite without words.
    """
    scale = min(1.0, PHONE / (96 * figure.get_figwidth()))
    sizes = [float(t.get_fontsize()) for t in texts(figure)]
    return min((96 / 72 * scale * size for size in sizes), default=float("inf"))


def problems(figure: Figure) -> list[str]:
    """What cannot be read: words too small, over one another, or outside their box or picture."""
    found = []
    if figure.get_figwidth() > WIDEST + 1e-6:
        found.append(
            f"it is {figure.get_figwidth():.1f} inches wide; at most {WIDEST:g} fit. Stack parts"
        )
    size = smallest_text(figure)
    if size < SMALLEST:
        found.append(f"its smallest words have {size:.1f} pixels on a phone; 7 are needed")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    dots = figure.dpi
    page = Bbox.from_bounds(0, 0, figure.get_figwidth() * dots, figure.get_figheight() * dots)
    boxes = [(t, ink_of(t, canvas)) for t in texts(figure)]
    for text, box in boxes:
        name = repr(text.get_text())
        room = cast("tuple[float, float] | None", getattr(text, "inside", None))
        if room is not None:
            need = 2 * box.width / dots + 0.2, 2 * box.height / dots + 0.1
            if need[0] > room[0] + 0.02 or need[1] > room[1] + 0.02:
                found.append(
                    f"{name} needs a box of {need[0]:.1f} × {need[1]:.1f}; it has "
                    f"{room[0]:.1f} × {room[1]:.1f}"
                )
        over = max(page.x0 - box.x0, box.x1 - page.x1, page.y0 - box.y0, box.y1 - page.y1)
        if over > 1:
            found.append(f"{name} leaves the picture by {2 * over / dots:.1f}")
    frames = [p.get_window_extent() for p in figure.findobj(FancyBboxPatch)]
    for text, box in boxes:
        if getattr(text, "inside", None) is None and any(crosses(box, f, dots) for f in frames):
            found.append(f"{text.get_text()!r} crosses the edge of a box")
    for (one, first), (other, second) in combinations(boxes, 2):
        if overlap(first, second, dots):
            found.append(f"{one.get_text()!r} lies over {other.get_text()!r}")
    return found


def ink_of(text: Text, canvas: FigureCanvasAgg) -> Bbox:
    return text.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]


def overlap(first: Bbox, second: Bbox, dots: float) -> bool:
    """Whether two boxes share more than a hair, .04 inches each way."""
    across = min(first.x1, second.x1) - max(first.x0, second.x0)
    up = min(first.y1, second.y1) - max(first.y0, second.y0)
    hair = 0.04 * dots
    return bool(across > hair and up > hair)


def crosses(words: Bbox, frame: Bbox, dots: float) -> bool:
    """Whether words lie on the edge of a box: partly in it, and not within it."""
    within = (
        frame.x0 <= words.x0
        and words.x1 <= frame.x1
        and frame.y0 <= words.y0
        and words.y1 <= frame.y1
    )
    return overlap(words, frame, dots) and not within

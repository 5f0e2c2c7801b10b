"""Drawings in the book's one visual language: boxes, arrows, timelines, matrices, angles.

One colour has one meaning in every chapter (`COLORS`), arrows point the way information flows,
and a drawing that could not be read on a phone refuses to be shown. Units are half an inch,
counted from the lower left corner; a drawing is at most 12 wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from memformer.lab.legible import problems, smallest_text
from memformer.lab.planes import Plane
from memformer.lab.shapes import (
    COLORS,
    INK,
    Box,
    Color,
    Point,
    Row,
    anchors,
    color_of,
    mixed,
    number,
)
from memformer.lab.timelines import Plan, Timeline, draw_backward, draw_timeline

__all__ = [
    "COLORS",
    "Box",
    "Color",
    "Drawing",
    "Plane",
    "Row",
    "Timeline",
    "number",
    "problems",
    "smallest_text",
]


class Drawing:
    """An empty canvas of `width × height` units of half an inch; methods draw and return boxes.

    Colours are named by what they mean, a key of `COLORS`. Raises `ValueError` where it is
    wider than 12.
    """

    def __init__(self, width: float = 12.0, height: float = 4.0) -> None:
        if not 0 < width <= 12:
            raise ValueError(
                f"width is {width}; it must be at most 12, or a phone cannot show it. Stack parts"
            )
        self.figure: Figure = plt.figure(figsize=(width / 2, height / 2))
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    # --- boxes ------------------------------------------------------------------------------

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        kind: str = "plain",
        size: float = 10.5,
        faded: bool = False,
    ) -> Box:
        """A rounded box, lower left corner at `(x, y)`; `faded` is there but plays no part."""
        color = color_of(kind)
        gap = 0.05  # so that boxes side by side do not touch
        shape = FancyBboxPatch(
            (x + gap, y + gap),
            width - 2 * gap,
            height - 2 * gap,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=mixed(color.fill, 0.4) if faded else color.fill,
            edgecolor=mixed(color.line, 0.5) if faded else color.line,
            linewidth=1.0,
            linestyle=color.style if kind == "forget" else "-",
            zorder=2,
        )
        self.axes.add_patch(shape)
        label = self.axes.text(
            x + width / 2,
            y + height / 2,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color="#6a6a6a" if faded else INK,
            zorder=4,
        )
        label.inside = (width, height)  # type: ignore[attr-defined]  # for `problems`
        return Box(x, y, width, height)

    def row(
        self,
        x: float,
        y: float,
        labels: Iterable[object],
        kind: str = "token",
        width: float = 1.0,
        height: float = 0.9,
        vertical: bool = False,
        size: float = 10.5,
        faded: Sequence[int] = (),
    ) -> Row:
        """One box per label, from left to right, or from top to bottom: returns them."""
        names = [str(label) for label in labels]
        boxes = []
        for i, name in enumerate(names):
            right, up = (0.0, (len(names) - 1 - i) * height) if vertical else (i * width, 0.0)
            at = x + right, y + up
            boxes.append(self.box(*at, width, height, name, kind, size, i in faded))
        return Row(boxes)

    def tokens(
        self,
        x: float,
        y: float,
        labels: Iterable[object],
        width: float = 1.0,
        height: float = 0.9,
        vertical: bool = False,
        size: float = 10.5,
        faded: Sequence[int] = (),
    ) -> Row:
        """A row of token boxes."""
        return self.row(x, y, labels, "token", width, height, vertical, size, faded)

    def slots(
        self,
        x: float,
        y: float,
        labels: Iterable[object] | int = 3,
        width: float = 1.0,
        height: float = 0.9,
        vertical: bool = False,
        size: float = 10.5,
        faded: Sequence[int] = (),
    ) -> Row:
        """A memory: a row of slot boxes. A number of slots names them m₁, m₂, …"""
        if isinstance(labels, int):
            labels = [f"$m_{i + 1}$" for i in range(labels)]
        return self.row(x, y, labels, "slot", width, height, vertical, size, faded)

    def layer(
        self, x: float, y: float, width: float, height: float, text: str, kind: str = "layer"
    ) -> Box:
        """A layer or a function; `kind` read, write or forget where it is one of these."""
        return self.box(x, y, width, height, text, kind)

    def cells(
        self,
        x: float,
        y: float,
        values: Tensor | Sequence[float],
        kind: str = "token",
        width: float = 0.9,
        height: float = 0.8,
        digits: int = 2,
        vertical: bool = False,
    ) -> Row:
        """A vector printed: one square cell a number."""
        numbers = [number(float(v), digits) for v in values]
        return self.row(x, y, numbers, kind, width, height, vertical, size=10)

    def matrix(
        self,
        x: float,
        y: float,
        values: Tensor | Sequence[Sequence[float]],
        rows: Sequence[object] = (),
        columns: Sequence[object] = (),
        kind: str = "read",
        width: float = 0.95,
        height: float = 0.7,
        digits: int = 2,
        high: float = 1.0,
        masked: Tensor | None = None,
    ) -> list[Row]:
        """Numbers in shaded cells with names at the left and on top: `result[i][j]` is a box.

        `(x, y)` is the lower left corner of the cells. White is 0, the full colour `high`;
        cells that are True in `masked` stay empty.
        """
        color, table = color_of(kind), [[float(v) for v in line] for line in values]
        found = []
        for i, line in enumerate(table):
            low, boxes = y + (len(table) - 1 - i) * height, []
            for j, value in enumerate(line):
                left, hidden = x + j * width, masked is not None and bool(masked[i][j])
                share = 0.0 if hidden else min(abs(value) / high, 1.0)
                face = "#f2f2f2" if hidden else mixed(color.line, 0.75 * share)
                shape = Rectangle((left, low), width, height, fc=face, ec="#9a9a9a", lw=0.6)
                self.axes.add_patch(shape)
                text = "" if hidden else number(value, digits)
                ink = "white" if share > 0.72 else INK
                middle = left + width / 2, low + height / 2
                self.axes.text(*middle, text, ha="center", va="center", fontsize=10, color=ink)
                boxes.append(Box(left, low, width, height))
            found.append(Row(boxes))
            if rows:
                self.note(x - 0.15, low + height / 2, str(rows[i]), align="right")
        for j, name in enumerate(columns):
            self.note(x + (j + 0.5) * width, y + len(table) * height + 0.3, str(name))
        return found

    # --- arrows and words -------------------------------------------------------------------

    def arrow(
        self,
        start: Box | Point,
        end: Box | Point,
        text: str = "",
        kind: str = "plain",
        bend: float = 0.0,
        strength: float = 0.25,
        at: float = 0.5,
        side: float = 1.0,
    ) -> None:
        """An arrow the way information flows, from a box or point to another.

        `strength` in [0, 1] is how thick; `bend` above 0 bends to the right of its way. `text`
        stands beside it, a share `at` of the way along, on the other side for `side=-1`.
        """
        color = color_of(kind)
        begin, goal = anchors(start, end)
        shape = FancyArrowPatch(
            begin,
            goal,
            arrowstyle="-|>",
            mutation_scale=9 + 6 * strength,
            color=color.line,
            linewidth=0.8 + 3.2 * strength,
            linestyle=color.style,
            shrinkA=1,
            shrinkB=1,
            connectionstyle=f"arc3,rad={bend}",
            zorder=3,
        )
        self.axes.add_patch(shape)
        if text:
            self.label(begin, goal, text, color.line, bend, at, side)

    def label(
        self,
        begin: Point,
        goal: Point,
        text: str,
        color: str,
        bend: float,
        at: float,
        side: float,
    ) -> None:
        """Words beside a line, clear of it whatever way it runs."""
        across, up = goal[0] - begin[0], goal[1] - begin[1]
        length = math.hypot(across, up) or 1.0
        normal = -up / length, across / length  # to the left of the way
        if normal[1] < 0 or (abs(normal[1]) < 1e-9 and normal[0] < 0):
            normal, flip = (-normal[0], -normal[1]), -1.0
        else:
            flip = 1.0
        lift = -2 * bend * length * at * (1 - at) * flip  # how far the curve is off the line
        off = lift + 0.16 * side
        x, y = begin[0] + at * across + off * normal[0], begin[1] + at * up + off * normal[1]
        push = side * normal[0]
        ha = "left" if push > 0.35 else "right" if push < -0.35 else "center"
        va = "center" if abs(normal[1]) < 0.5 else "bottom" if side > 0 else "top"
        self.axes.text(x, y, text, ha=ha, va=va, fontsize=10, color=color, zorder=5)

    def read(self, slot: Box | Point, token: Box | Point, text: str = "", **how: float) -> None:
        """A read: from a slot to a token."""
        self.arrow(slot, token, text, "read", **how)

    def write(
        self, token: Box | Point, slot: Box | Point, text: str = "", **how: float
    ) -> None:
        """A write: from a token to a slot, or from a slot to its own next content."""
        self.arrow(token, slot, text, "write", **how)

    def note(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 10,
        align: str = "center",
        kind: str = "plain",
    ) -> None:
        """Words on the drawing: `(x, y)` is their centre, or for `align` left or right that end."""
        ink = INK if kind == "plain" else color_of(kind).line
        self.axes.text(x, y, text, ha=align, va="center", fontsize=size, color=ink, zorder=5)

    def title(self, text: str, y: float | None = None) -> None:
        """A bold line at the left, on top, or at `y` over one of several stacked parts."""
        high = self.axes.get_ylim()[1] - 0.35 if y is None else y
        self.axes.text(
            0.15, high, text, ha="left", va="center", fontsize=10.5, weight="bold", color=INK
        )

    def frame(self, around: Iterable[Box], text: str = "", margin: float = 0.25) -> Box:
        """A dashed frame around boxes, its name above it."""
        whole = Row(around).all
        x, y = whole.x - margin, whole.y - margin
        width, height = whole.width + 2 * margin, whole.height + 2 * margin
        self.axes.add_patch(
            Rectangle(
                (x, y),
                width,
                height,
                fill=False,
                ec="#77777f",
                lw=0.9,
                ls=(0, (4, 3)),
                zorder=1,
            )
        )
        if text:
            self.note(x + width / 2, y + height + 0.25, text)
        return Box(x, y, width, height)

    # --- larger parts -----------------------------------------------------------------------

    def timeline(
        self,
        segments: Sequence[Sequence[object]],
        x: float = 0.2,
        y: float = 0.7,
        width: float | None = None,
        slots: int = 2,
        names: Sequence[object] | None = None,
        flows: bool = True,
        words: bool = True,
    ) -> Timeline:
        """Segments t = 1 … T below, the memory carried above: read, then written, each time.

        `segments` are the labels of the tokens in each; `names` are their t, as 1, 2, "…", 9.
        With `flows` the arrows are drawn, with `words` the first of them are named. It is
        about 4 high; `backward` adds the way of the gradient, half a unit above it.
        """
        room = width or self.axes.get_xlim()[1] - 2 * x
        plan = Plan(x, y, room, slots, list(names or range(1, len(segments) + 1)))
        return draw_timeline(self, segments, plan, flows, words)

    def backward(self, timeline: Timeline, text: str = "gradient", first: int = 0) -> None:
        """The way back through time, above a timeline, from its end to memory `first`."""
        draw_backward(self, timeline, text, first)

    def plane(self, x: float, y: float, radius: float, circle: bool = True) -> Plane:
        """A plane with its centre at `(x, y)`, on which arrows have angles: see `Plane`."""
        return Plane(self, (x, y), radius, circle)

    def show(self) -> None:
        """Show it. Raises `ValueError` that lists what nobody could read, before it is shown."""
        found = problems(self.figure)
        if found:
            plt.close(self.figure)
            raise ValueError("this drawing cannot be read:\n  " + "\n  ".join(found))
        plt.show()

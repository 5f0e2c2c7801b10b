"""What drawings are made of: the colours and what they mean, boxes, numbers in few characters."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.colors import to_rgb

INK = "#22222a"
Point = tuple[float, float]


class Color(NamedTuple):
    """What one meaning looks like; every line can be read on white and on its fill."""

    fill: str
    line: str
    style: str = "-"


COLORS = {
    "token": Color("#d9e8f6", "#056bcf"),  # tokens, segments, what is computed for each token
    "slot": Color("#fde2b8", "#7b4604"),  # slots and the memory, and a model that has one
    "read": Color("#cdebe6", "#087e72"),  # slot → token
    "write": Color("#f0d3e8", "#771b5c"),  # token → slot
    "forget": Color("#f3f0b5", "#6f7506", ":"),  # the bias v and normalisation
    "state": Color("#dfe0f2", "#4f4391"),  # a carried state that is not slots
    "gradient": Color("#fbd3c6", "#c93a00", "--"),  # losses, and what flows back from them
    "layer": Color("#e8e8ec", "#4d4d55"),  # a layer or a function
    "plain": Color("#ffffff", "#4d4d55"),
}


class Box(NamedTuple):
    """A rectangle on the canvas, with the points from which arrows start."""

    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y + self.height

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y

    def edge_towards(self, goal: Point) -> Point:
        """The middle of the side that faces `goal`."""
        across, up = goal[0] - self.center[0], goal[1] - self.center[1]
        if abs(up) * self.width >= abs(across) * self.height:
            return self.top if up > 0 else self.bottom
        return self.right if across > 0 else self.left


class Row(tuple[Box, ...]):
    """Boxes side by side or one above the other: `row[i]` is one, `row.all` is around all."""

    @property
    def all(self) -> Box:
        left, low = min(b.x for b in self), min(b.y for b in self)
        right = max(b.x + b.width for b in self)
        high = max(b.y + b.height for b in self)
        return Box(left, low, right - left, high - low)


def mixed(color: str, share: float) -> tuple[float, float, float]:
    """`share` of a colour, the rest white."""
    r, g, b = (1 - share * (1 - part) for part in to_rgb(color))
    return r, g, b


def number(value: float, digits: int = 2) -> str:
    """As few characters as it takes: .25 for 0.25, –.5 for -0.50, 1 for 1.00."""
    text = f"{abs(value):.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    text = text.removeprefix("0") or "0"
    text = "0" if text == "." else text
    return f"–{text}" if value < 0 and text != "0" else text


def color_of(kind: str) -> Color:
    """What a meaning looks like. Raises `ValueError` that lists the meanings there are."""
    if kind not in COLORS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(COLORS)}")
    return COLORS[kind]


def anchors(start: Box | Point, end: Box | Point) -> tuple[Point, Point]:
    """Where an arrow between two boxes begins and ends: on the sides that face each other."""
    first = start.center if isinstance(start, Box) else start
    last = end.center if isinstance(end, Box) else end
    if isinstance(start, Box):
        first = start.edge_towards(last)
    if isinstance(end, Box):
        last = end.edge_towards(first)
    return first, last

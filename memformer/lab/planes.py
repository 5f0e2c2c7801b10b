"""Directions on a plane: what slots turn on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.patches import Arc

from memformer.lab.shapes import INK, Point

if TYPE_CHECKING:
    from memformer.lab.figures import Drawing


class Plane:
    """The unit circle around a point of a drawing, and directions on it."""

    def __init__(self, drawing: Drawing, center: Point, radius: float, circle: bool) -> None:
        self.drawing, self.center, self.radius = drawing, center, radius
        if circle:
            size = 2 * radius
            drawing.axes.add_patch(Arc(center, size, size, ec="#a8a8ae", lw=0.9, zorder=0))

    def at(self, degrees: float, length: float = 1.0) -> Point:
        """The point in that direction."""
        turn = math.radians(degrees)
        far = length * self.radius
        return self.center[0] + far * math.cos(turn), self.center[1] + far * math.sin(turn)

    def vector(
        self,
        degrees: float,
        text: str = "",
        kind: str = "slot",
        length: float = 1.0,
        start: Point | None = None,
    ) -> Point:
        """An arrow in a direction, its name beyond its tip; returns the tip."""
        tip = self.at(degrees, length)
        self.drawing.arrow(start or self.center, tip, kind=kind)
        x, y = self.at(degrees, length + 0.36 / self.radius)
        side = math.cos(math.radians(degrees))
        align = "left" if side > 0.5 else "right" if side < -0.5 else "center"
        if text:
            x -= 0.2 if align == "left" else -0.2 if align == "right" else 0.0
            self.drawing.note(x, y, text, 10.5, align, kind)
        return tip

    def angle(self, start: float, end: float, text: str = "", share: float = 0.4) -> None:
        """The arc between two directions, at a `share` of the radius, and its name."""
        size = 2 * share * self.radius
        low, high = min(start, end), max(start, end)
        arc = Arc(self.center, size, size, theta1=low, theta2=high, ec=INK, lw=1.0, zorder=3)
        self.drawing.axes.add_patch(arc)
        self.drawing.note(*self.at((low + high) / 2, share + 0.32 / self.radius), text)

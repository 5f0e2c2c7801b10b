"""Segments from left to right with the memory carried between them, and the gradient's way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from memformer.lab.shapes import Box, Row

if TYPE_CHECKING:
    from memformer.lab.figures import Drawing

WIDE, HIGH = 0.9, 0.55  # of a slot


class Timeline(NamedTuple):
    """Segments from left to right, and the memories before, between and after them."""

    segments: list[Row]
    memories: list[Row]  # one more than there are segments


class Plan(NamedTuple):
    """Where a timeline stands: its lower left corner, its width, its slots, its times."""

    x: float
    y: float
    width: float
    slots: int
    times: list[object]


def draw_timeline(
    d: Drawing, segments: Sequence[Sequence[object]], plan: Plan, flows: bool, words: bool
) -> Timeline:
    """See `Drawing.timeline`."""
    x, y, width, slots, times = plan
    count, top = len(segments), y + 2.0
    length = (width - (count + 1) * WIDE) / count  # between two memories
    memories, rows = [], []
    for t in range(count + 1):
        left = x + t * (WIDE + length)
        memories.append(d.slots(left, top, [""] * slots, WIDE, HIGH, vertical=True))
        index = "0" if t == 0 else str(times[t - 1])
        if t == 0 and times[0] not in (0, 1):
            index = "t-1" if times[0] == "t" else str(int(str(times[0])) - 1)
        if index != "…":
            high = top + slots * HIGH + 0.3
            d.note(left + WIDE / 2, high, f"$M_{{{index}}}$", kind="slot")
    for t, labels in enumerate(segments):
        left = x + WIDE + t * (WIDE + length) + 0.1
        each = (length - 0.2) / max(1, len(labels))
        rows.append(d.tokens(left, y, labels, each, 0.8))
        name = "…" if times[t] == "…" else f"$t={times[t]}$"
        d.note(left + (length - 0.2) / 2, y - 0.3, name)
        if flows:
            flow(d, memories[t].all, rows[t].all, memories[t + 1].all, words and t == 0)
    return Timeline(rows, memories)


def flow(d: Drawing, before: Box, segment: Box, after: Box, words: bool) -> None:
    """What happens in one timestep: carried, read, written."""
    high = before.y + before.height * 0.75
    d.arrow((before.right[0], high), (after.x, high), "carried" if words else "", "slot")
    quarter, low = segment.width / 4, before.y + 0.2
    top, middle = segment.y + segment.height, segment.center[0]
    d.read((before.right[0], low), (segment.x + quarter, top))
    d.write((segment.x + 3 * quarter, top), (after.x, low))
    if words:
        d.note(middle, top + 0.9, "read", kind="read")
        d.note(middle, top + 0.45, "write", kind="write")


def draw_backward(d: Drawing, timeline: Timeline, text: str, first: int) -> None:
    """See `Drawing.backward`."""
    whole = [memory.all for memory in timeline.memories]
    high = whole[0].y + whole[0].height + 0.7
    for t in range(len(whole) - 1, first, -1):
        begin, end = whole[t].center[0] - 0.1, whole[t - 1].center[0] + 0.1
        last = t == len(whole) - 1
        d.arrow((begin, high), (end, high), text if last else "", "gradient")

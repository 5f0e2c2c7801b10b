"""Drawings: colours that can be told apart, arrows between boxes, words that can be read."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from memformer.lab import plots
from memformer.lab.figures import COLORS, Box, Drawing, number, problems, smallest_text
from memformer.lab.shapes import INK, anchors
from memformer.lab.tracing import MemoryTrace

sizes = st.floats(0.3, 5)
places = st.floats(-20, 20)


@pytest.fixture(autouse=True)
def style():
    plt.switch_backend("agg")
    plots.book_style()
    yield
    plt.close("all")


# --- colours --------------------------------------------------------------------------------


def linear(color):
    part = np.array(to_rgb(color))
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """As the accessibility guidelines (WCAG 2) define it."""
    bright = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


def test_words_and_lines_can_be_read_on_paper_and_on_their_boxes():
    for name, color in COLORS.items():
        assert contrast(color.line, "white") >= 4.5, name
        assert contrast(color.line, color.fill) >= 3, name
        assert contrast(INK, color.fill) >= 7, name
    for name, line in plots.SERIES.items():
        assert contrast(line["color"], "white") >= 4.5, name


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
}  # fmt: skip


def lab(rgb):
    """Oklab: distances are about what is seen."""
    m1 = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    m2 = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(m2) @ np.cbrt(np.clip(np.array(m1) @ rgb, 0, None))


@pytest.mark.parametrize("eye", BLINDNESS)
def test_meanings_are_told_apart(eye):
    """By their colour, or by a line that is solid, dashed or dotted."""

    def seen(color):
        return lab(np.array(BLINDNESS[eye]) @ linear(color))

    meant = [name for name in COLORS if name not in ("layer", "plain")]
    for one, other in itertools.combinations(meant, 2):
        first, second = COLORS[one], COLORS[other]
        if first.style == second.style:
            assert np.linalg.norm(seen(first.line) - seen(second.line)) > 0.07, (one, other)
    assert len({color.style for color in COLORS.values()}) == 3


def test_an_unknown_meaning_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'tokens'.*token, slot, read"):
        Drawing(4, 2).box(0, 0, 1, 1, kind="tokens")
    with pytest.raises(ValueError, match=r"'off'.*wiped"):
        plots.series("off")


# --- geometry -------------------------------------------------------------------------------


@given(places, places, sizes, sizes, places, places)
def test_arrows_start_and_end_on_the_sides_that_face_each_other(x, y, width, height, u, v):
    box, other = Box(x, y, width, height), Box(u, v, 1.0, 1.0)
    begin, end = anchors(box, other)
    assert begin in (box.left, box.right, box.top, box.bottom)
    assert end in (other.left, other.right, other.top, other.bottom)
    assert anchors(begin, end) == (begin, end)
    if u > x + 3 * width + 3 and abs(v - y) < 0.1:
        assert begin == box.right
        assert end == other.left


@given(st.floats(-99, 99), st.integers(1, 4))
def test_printed_numbers_are_the_numbers(value, digits):
    text = number(value, digits).replace("–", "-")
    assert float(text) == pytest.approx(value, abs=0.51 * 10**-digits)


def test_numbers_are_short():
    shown = [number(v) for v in (0.25, -0.5, 1.0, 0.0, -0.001, 10, 12.5, -1.25)]
    assert shown == [".25", "–.5", "1", "0", "0", "10", "12.5", "–1.25"]


def test_rows_give_back_their_boxes():
    d = Drawing(12, 6)
    row = d.tokens(1, 2, ["a", "b", "c"], 2, 1)
    column = d.slots(8, 1, 3, 1, 1, vertical=True)
    assert row.all == Box(1, 2, 6, 1)
    assert [box.x for box in row] == [1, 3, 5]
    assert column.all == Box(8, 1, 1, 3)
    assert [box.y for box in column] == [3, 2, 1]  # the first on top
    cells = d.matrix(1, 4, torch.eye(2), "ab", "cd")
    assert cells[0][1] == Box(1.95, 4.7, 0.95, 0.7)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_timeline_has_a_memory_more_than_segments(count):
    d = Drawing(12, 5)
    time = d.timeline([["x"]] * count)
    d.backward(time)
    assert (len(time.segments), len(time.memories)) == (count, count + 1)
    assert problems(d.figure) == []
    for before, segment, after in zip(
        time.memories, time.segments, time.memories[1:], strict=False
    ):
        assert before.all.right[0] < segment.all.x
        assert segment.all.right[0] < after.all.x


def test_a_read_and_a_write_point_the_way_information_flows():
    d = Drawing(6, 4)
    (slot,), (token,) = d.slots(1, 3, 1), d.tokens(1, 0.1, ["x"])
    d.read(slot, token)
    d.write(token, slot)
    reading, writing = d.axes.patches[-2:]
    assert reading._posA_posB == [slot.bottom, token.top]
    assert writing._posA_posB == [token.top, slot.bottom]


# --- what a phone can show ------------------------------------------------------------------


def test_a_good_drawing_is_shown():
    d = Drawing(12, 3)
    d.tokens(1, 1, ["its", "capital"], 2)
    assert smallest_text(d.figure) >= 7
    assert problems(d.figure) == []
    d.show()


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (lambda d: d.note(5, 1, "tiny", size=7), r"5\.8 pixels"),
        (lambda d: d.tokens(1, 1, ["parliament"], 1), "needs a box"),
        (lambda d: d.note(11.8, 1, "far out"), "leaves the picture"),
        (
            lambda d: [d.note(5, 1, "over"), d.note(5.2, 1.1, "under")],
            "'over' lies over 'under'",
        ),
        (lambda d: [d.box(4, 1, 1, 1), d.note(5, 1.5, "edge")], "crosses the edge"),
    ],
)
def test_what_cannot_be_read_is_refused(fault, complaint):
    d = Drawing(12, 3)
    fault(d)
    with pytest.raises(ValueError, match=complaint):
        d.show()


def test_what_no_phone_can_show_is_refused():
    with pytest.raises(ValueError, match="at most 12"):
        Drawing(13, 2)
    with pytest.raises(ValueError, match="1 or 2"):
        plots.panels(3, beside=3)
    figure, _ = plt.subplots(figsize=(9, 3))
    assert "9.0 inches wide" in problems(figure)[0]


def test_plots_can_be_read():
    figure, (axes,) = plots.panels()
    x = torch.arange(20)
    for i, name in enumerate(plots.SERIES):
        if i < 4:
            axes.plot(x, x * (1 + i / 50), **plots.series(name))
    axes.set(xlabel="segments", ylabel="recall")
    plots.name_lines(axes)
    assert problems(figure) == []
    plots.show()


def test_traces_are_drawn_one_panel_above_the_other():
    write = torch.rand(6, 2, 1, 4, 8).softmax(dim=-1)
    read = tuple(torch.rand(6, 2, 2, 7, 4).softmax(dim=-1) for _ in range(3))
    memories = torch.nn.functional.normalize(torch.randn(7, 2, 4, 5), dim=-1)
    record = MemoryTrace(write, read, memories)
    for figure, count in ((plots.draw_writes(record), 2), (plots.draw_reads(record, 1), 3)):
        assert problems(figure) == []
        pictures = [axes for axes in figure.axes if axes.get_images()]
        assert len(pictures) == count
        assert pictures[0].get_images()[0].get_array().shape == (4, 6)

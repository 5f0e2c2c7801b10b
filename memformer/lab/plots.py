"""Plots in the book's style: one colour one meaning, panels stacked, legible on a phone."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from memformer.lab.legible import problems
from memformer.lab.shapes import INK, color_of, mixed
from memformer.lab.tracing import MemoryTrace

SERIES: dict[str, dict[str, Any]] = {  # what is compared throughout → its line
    "with memory": {"color": "#7b4604", "linestyle": "-", "linewidth": 2.2},
    "wiped": {"color": "#6d6d76", "linestyle": "--"},
    "trained without": {"color": INK, "linestyle": "-."},
    "chance": {"color": "#6d6d76", "linestyle": ":", "linewidth": 1.2},
    "theory": {"color": INK, "linestyle": ":", "linewidth": 1.2},
    "attention over everything": {"color": "#056bcf", "linestyle": "-"},
    "full BPTT": {"color": INK, "linestyle": "-"},
    "truncated": {"color": "#6d6d76", "linestyle": "--"},
    "replay": {"color": "#c93a00", "linestyle": "-", "linewidth": 2.2},
}


def book_style() -> None:
    """The look of every plot and drawing; in a notebook also twice the pixels for print."""
    plt.style.use("memformer.book")
    try:
        from IPython.core.getipython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("retina")  # type: ignore[no-untyped-call]


def series(name: str) -> dict[str, Any]:
    """How a line is drawn wherever it is compared: `axes.plot(x, y, **series("wiped"))`.

    Raises `ValueError` that lists the names there are.
    """
    if name not in SERIES:
        raise ValueError(f"series is {name!r}; it must be one of {', '.join(SERIES)}")
    return {"label": name, **SERIES[name]}


def shades(count: int, kind: str = "plain") -> list[tuple[float, float, float]]:
    """`count` shades of one meaning, light to dark, for what comes in an order: layers, T, ages."""
    line = color_of(kind).line
    return [mixed(line, 0.4 + 0.6 * i / max(1, count - 1)) for i in range(count)]


def ramp(kind: str = "plain") -> LinearSegmentedColormap:
    """A colour map from white to the colour of a meaning, for weights."""
    return LinearSegmentedColormap.from_list(kind, ["#ffffff", color_of(kind).line])


def panels(count: int = 1, height: float = 2.4, beside: int = 1) -> tuple[Figure, list[Axes]]:
    """`count` panels of a plot 6 inches wide, stacked; at most two stand side by side.

    Raises `ValueError` for more: a phone cannot show them.
    """
    if not 1 <= beside <= 2:
        raise ValueError(f"beside is {beside}; it must be 1 or 2, the rest is stacked")
    rows = -(-count // beside)
    figure, axes = plt.subplots(
        rows, beside, figsize=(6, height * rows), layout="constrained", squeeze=False
    )
    places = [axes[i // beside, i % beside] for i in range(rows * beside)]
    for spare in places[count:]:
        spare.axis("off")
    return figure, places[:count]


def heat(
    axes: Axes,
    values: Tensor,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    kind: str = "plain",
    low: float = 0.0,
    high: float | None = None,
    bar: bool = True,
    first: int = 1,
    signed: bool = False,
) -> None:
    """A matrix as a picture, row `first` on top, in shades of a meaning; `signed` from –high."""
    rows, columns = values.shape
    numbers = values.detach().float().cpu().numpy()
    if signed:
        high = float(abs(numbers).max()) if high is None else high
        low = -high
    edge = first - 0.5
    image = axes.imshow(
        numbers,
        cmap="PuOr" if signed else ramp(kind),
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
        extent=(edge, edge + columns, edge + rows, edge),
    )
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(False)
    if bar:
        axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)


def name_lines(axes: Axes) -> None:
    """Names at the right ends of the lines, in their colours, in place of a legend.

    Names that would meet move apart. For figures of `panels`, which make room for them.
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes are in no figure")
    figure.draw_without_rendering()
    step = 14 * figure.dpi / 96 / axes.get_window_extent().height  # between two names
    ends = []
    for line in axes.get_lines():
        if not str(line.get_label()).startswith("_"):
            last = [float(np.asarray(data)[-1]) for data in line.get_data()]
            end = axes.transAxes.inverted().transform(axes.transData.transform(last))
            ends.append((float(end[1]), line))
    place = -1.0
    for y, line in sorted(ends, key=lambda end: end[0]):
        place = max(y, place + step)
        axes.text(
            1.02,
            place,
            str(line.get_label()),
            transform=axes.transAxes,
            color=line.get_color(),
            va="center",
            fontsize=9.5,
        )


def show() -> None:
    """Show a plot. Raises `ValueError` that lists what nobody could read, before it is shown."""
    figure = plt.gcf()
    if found := problems(figure):
        plt.close(figure)
        raise ValueError("this plot cannot be read:\n  " + "\n  ".join(found))
    plt.show()


def draw_writes(trace: MemoryTrace, stream: int = 0) -> Figure:
    """What became of each slot at each timestep, for one stream of a trace.

    Above, the share of its attention that a slot gave to itself; below, the angle in degrees by
    which it turned. Rows are slots, columns timesteps.
    """
    kept = trace.self_weight[:, stream].T
    before, after = trace.memories[:-1, stream], trace.memories[1:, stream]
    cosine = F.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    turned = cosine.arccos().rad2deg().T
    figure, axes = panels(2)
    heat(axes[0], kept, "", "slot", "kept: weight on the slot itself", "slot", high=1.0)
    heat(axes[1], turned, "timestep", "slot", "turned, in degrees", "write", high=90.0)
    return figure


def draw_reads(trace: MemoryTrace, stream: int = 0) -> Figure:
    """How much each slot is read at each timestep, one panel a layer, for one stream.

    Rows are slots, columns timesteps; the shares of a column add up to 1.
    """
    sums = [w[:, stream].sum(dim=(1, 2)).T for w in trace.read]  # over heads, tokens: (K, T)
    shares = [s / s.sum(dim=0) for s in sums]
    high = max(float(share.max()) for share in shares)
    figure, axes = panels(len(shares), height=2.0)
    for layer, (panel, share) in enumerate(zip(axes, shares, strict=True)):
        label = "timestep" if layer == len(shares) - 1 else ""
        heat(panel, share, label, "slot", f"read in layer {layer + 1}", "read", high=high)
    return figure

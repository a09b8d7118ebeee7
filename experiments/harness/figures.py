"""The pictures of the experiments: one style, titles, panels, labels at the ends of lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip
GREY, LIGHT, INK = "#6B6B6B", "#E3E3E3", "#222222"
STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": LIGHT, "axes.axisbelow": True, "lines.linewidth": 2.2, "lines.solid_capstyle": "round",
    "legend.frameon": False,
}  # fmt: skip


@contextmanager
def drawn(path: Path, width: float, height: float, title: str, subtitle: str = "") -> Iterator[Figure]:
    """A figure of this size in inches with its title, to be drawn on; then it is written.

    The title is bold and the subtitle grey, flush left, at the same distance from the top of every figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        inch = 1 / height
        figure.text(0.01, 1 - 0.08 * inch, title, va="top", fontsize=14, fontweight="bold", color=INK)
        figure.text(0.01, 1 - 0.38 * inch, subtitle, va="top", fontsize=11, color=GREY)
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - (0.68 if subtitle else 0.4) * inch))
        yield figure
        figure.savefig(path, dpi=150)


@contextmanager
def panels(path: Path, titles: Sequence[str], title: str, subtitle: str = "") -> Iterator[Sequence[Axes]]:
    """Axes side by side, each with a bold title; the legend of the first one stands below all."""
    with drawn(path, max(9, 5.5 * len(titles)), 4.8, title, subtitle) as figure:
        made = figure.subplots(1, len(titles), squeeze=False)[0]
        yield made
        for axes, text in zip(made, titles, strict=True):
            panel_title(axes, text)
        handles, labels = made[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9.5)


def draw_spread(axes: Axes, found: Mapping[float, Sequence[float]], **style: Any) -> list[float]:
    """At each place the mean of some values, with their standard deviation as a bar; returns the means."""
    means = [mean(values) for values in found.values()]
    axes.errorbar(list(found), means, [pstdev(values) for values in found.values()], capsize=3, **style)
    return means


def panel_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
    """Write each line's name at its right end, moved apart where two ends are closer than ``gap`` points.

    An end has a place, a value, a name and a colour.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # the layout is known only then, and places in points with it
    above = float("inf")  # where the name above stands; from the top down each is pushed below it
    for place, value, name, colour in sorted(ends, key=lambda end: -end[1]):
        own = axes.transData.transform((place, value))[1] * 72 / figure.dpi
        above = min(own, above - gap)
        axes.annotate(
            name, (place, value), xytext=(12, above - own), textcoords="offset points", va="center", color=colour,
            fontweight="bold", fontsize=10.5, annotation_clip=False,
        )  # fmt: skip

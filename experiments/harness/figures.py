"""The style of all pictures: colours, titles, sizes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip
GREY, LIGHT, INK = "#6B6B6B", "#E3E3E3", "#222222"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LIGHT,
    "axes.axisbelow": True,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def write_title(figure: Figure, title: str, subtitle: str) -> None:
    """A bold line and a grey one, flush left, at the same distance from the top of every figure."""
    inch = 1 / figure.get_figheight()
    figure.text(0.01, 1 - 0.08 * inch, title, va="top", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.38 * inch, subtitle, va="top", fontsize=11, color=GREY)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.68 * inch))


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write it; returns the path."""
    figure.savefig(path, dpi=150)
    return path

"""The picture of the unequal workers: the local step of each, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.harness.figures import BLUE, GREY, INK, STYLE
from experiments.unequal.tables import chosen

COLOURS = {"equal": GREY, "auto": BLUE}


def draw_steps(path: Path, contents: Sequence[Mapping[str, Any]]) -> Path:
    """One panel per number of workers, two bars per worker; on them, its blocks. The highest bar is what all wait for."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(7, 4.6 * len(contents)), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, content in zip(figure.subplots(1, len(contents), squeeze=False)[0], contents, strict=True):
            _panel(axes, content)
        figure.axes[0].set_ylabel("seconds per local step")
        handles = [
            Patch(color=GREY, label="equal shares"),
            Patch(color=BLUE, label='blocks_per_worker="auto", after measuring'),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle("The last worker is slow", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        figure.savefig(path, dpi=150)
    return path


def _panel(axes: Any, content: Mapping[str, Any]) -> None:
    for side, (shares, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        rows = chosen(content, shares)
        heights = [mean(times) for times in zip(*(row["step_seconds"] for row in rows), strict=True)]
        bars = axes.bar([worker + side for worker in range(len(heights))], heights, width=0.38, color=colour)
        axes.bar_label(bars, [f"{count}" for count in rows[-1]["blocks"]], color=INK, fontsize=9.5, padding=2)
    cores = content["settings"]["cores"]
    axes.set_xticks(range(len(cores)), [f"worker {worker}\n{share:.2g} core" for worker, share in enumerate(cores)])
    axes.set_title(f"{len(cores)} workers (on the bars: blocks)", loc="left", fontsize=11.5, color=INK)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)

"""The picture of the time to accuracy: one panel per bandwidth, one line per method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.harness.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, STYLE, VERMILION
from experiments.links.networks import network_in_words
from experiments.links.tables import bandwidth, title

COLOURS = {"ddp": GREY, "local_sgd": ORANGE, "resist": BLUE, "ist": BLUE, "resist_int8": GREEN}
OTHERS = (PURPLE, SKY, VERMILION)


def draw_curves(path: Path, content: Mapping[str, Any]) -> Path:
    """Test accuracy of the full model against seconds of training."""
    rows, settings = content["rows"], content["settings"]
    panels = list(dict.fromkeys(row["bandwidth_gbit"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rest = (method for method in methods if method not in COLOURS)
    colours = {**COLOURS, **{method: OTHERS[i % len(OTHERS)] for i, method in enumerate(rest)}}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(9, 5.6 * len(panels)), 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, gbit in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            for row in (row for row in rows if row["bandwidth_gbit"] == gbit):
                colour = colours[row["method"]]
                axes.plot(row["seconds"], row["accuracy"], color=colour, marker="o", markersize=4)
                axes.plot(row["seconds"][-1], row["accuracy"][-1], "o", color=colour, markersize=8, clip_on=False)
            axes.set_title(bandwidth(gbit), loc="left", fontsize=12, fontweight="bold", color=INK)
            axes.set(xlabel="seconds of training", xlim=(0, None))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(True, axis="y")
        figure.axes[0].set_ylabel("test accuracy of the full model")
        handles = [
            mpl.lines.Line2D([], [], color=colours[method], marker="o", label=title(method)) for method in methods
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(methods))
        figure.suptitle(
            f"Time to accuracy\n{settings['workers']} workers, {network_in_words(settings['network'])}, "
            f"{settings['steps']} local steps of batch {settings['batch']}",
            x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK,
        )  # fmt: skip
        figure.savefig(path, dpi=150)
    return path

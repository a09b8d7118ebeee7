"""The picture of the speed over links: seconds per local step, compute below and sync above."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.harness.figures import BLUE, GREY, INK, LIGHT, ORANGE, STYLE
from experiments.links.networks import network_in_words
from experiments.links.tables import bandwidth, title


def draw_links(path: Path, content: Mapping[str, Any]) -> Path:
    """One panel per bandwidth, each with its own scale: a slow link would flatten all others."""
    rows, settings = content["rows"], content["settings"]
    panels = list(dict.fromkeys(row["bandwidth_gbit"] for row in rows))
    most = max(sum(row["bandwidth_gbit"] == gbit for row in rows) for gbit in panels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 1.6 + len(panels) * (0.5 + 0.34 * most)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, gbit in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _panel(axes, [row for row in rows if row["bandwidth_gbit"] == gbit])
            axes.set_title(bandwidth(gbit), loc="left", fontsize=12, fontweight="bold", color=INK)
        axes.set_xlabel("seconds per local step")
        handles = [
            Patch(color=BLUE, label="compute"),
            Patch(color=ORANGE, label="sync (of DDP: what the backward pass does not hide)"),
            Patch(facecolor="none", edgecolor=GREY, hatch="////", label="computed, not measured"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle(
            f"Seconds per local step: {network_in_words(settings['network'])}, "
            f"{settings['workers']} workers, batch {settings['batch']}, {settings['local_steps']} local steps per sync",
            x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK,
        )  # fmt: skip
        figure.savefig(path, dpi=150)
    return path


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    longest = max(row["seconds_per_step"] for row in rows)
    for place, row in enumerate(rows):
        compute, whole = row["compute_seconds"], row["seconds_per_step"]
        hatch = None if row["measured"] else "////"
        axes.barh(place, compute, color=BLUE, height=0.68, hatch=hatch, edgecolor="white", linewidth=0)
        axes.barh(
            place, whole - compute, left=compute, color=ORANGE, height=0.68, hatch=hatch, edgecolor="white", linewidth=0
        )
        axes.text(whole + longest * 0.008, place, f"{whole:.3g} s", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(rows)), [title(row["method"]) for row in rows])
    axes.set(xlim=(0, longest * 1.09), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color=LIGHT)
    axes.spines["left"].set_visible(False)

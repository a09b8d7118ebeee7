"""The picture of the speed over links: seconds per local step, compute below and sync above."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from experiments.harness.figures import BLUE, GREY, INK, LIGHT, ORANGE, drawn, panel_title
from experiments.harness.tables import Content, Rows
from experiments.links.tables import bandwidth, title
from experiments.networks import in_words


def draw_links(path: Path, content: Content) -> Path:
    """A panel per bandwidth, each with its own scale: a slow link would flatten all others."""
    rows, settings = content["rows"], content["settings"]
    links = list(dict.fromkeys(row["bandwidth_gbit"] for row in rows))
    most = max(sum(row["bandwidth_gbit"] == gbit for row in rows) for gbit in links)
    said = (
        f"{in_words(settings['network'])}, {settings['workers']} workers, batch {settings['batch']}, "
        f"{settings['local_steps']} local steps per sync"
    )
    with drawn(path, 12, 2 + len(links) * (0.5 + 0.34 * most), "Seconds per local step", said) as figure:
        for axes, gbit in zip(figure.subplots(len(links), 1, squeeze=False)[:, 0], links, strict=True):
            _panel(axes, [row for row in rows if row["bandwidth_gbit"] == gbit])
            panel_title(axes, bandwidth(gbit))
        axes.set_xlabel("seconds per local step")
        handles = [
            Patch(color=BLUE, label="compute"),
            Patch(color=ORANGE, label="sync (of DDP: what the backward pass does not hide)"),
            Patch(facecolor="none", edgecolor=GREY, hatch="////", label="computed, not measured"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return path


def _panel(axes: Axes, rows: Rows) -> None:
    longest = max(row["seconds_per_step"] for row in rows)
    for place, row in enumerate(rows):
        compute, whole = row["compute_seconds"], row["seconds_per_step"]
        style = {"height": 0.68, "hatch": None if row["measured"] else "////", "edgecolor": "white", "linewidth": 0}
        axes.barh(place, compute, color=BLUE, **style)
        axes.barh(place, whole - compute, left=compute, color=ORANGE, **style)
        axes.text(whole + longest * 0.008, place, f"{whole:.3g} s", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(rows)), [title(row["method"]) for row in rows])
    axes.set(xlim=(0, longest * 1.09), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color=LIGHT)
    axes.spines["left"].set_visible(False)

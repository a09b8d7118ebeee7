"""Two pictures: accuracy over the number of workers, and over the local steps per round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.accuracy.tables import SETS, TITLES, Content, chosen, distinct, read
from experiments.harness.figures import BLUE, GREEN, GREY, INK, ORANGE, STYLE

COLOURS = {"resist": BLUE, "local_sgd": ORANGE, "ddp": GREEN, "single": GREY}


def draw_all(folder: Path) -> list[Path]:
    """Draw what the result files of ``folder`` allow; returns the pictures."""
    drawn = []
    for name, key, axis in (
        ("main", "workers", "workers S"),
        ("local_steps", "local_steps", "local steps per round"),
    ):
        content = read(name, folder)
        if content:
            drawn.append(_draw(folder / f"accuracy_by_{key}.png", content, key, axis))
    return drawn


def _draw(path: Path, content: Content, key: str, axis: str) -> Path:
    rows = content["rows"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        ends = [_curve(axes, rows, method, key) for method in ("resist", "local_sgd", "ddp") if _has(rows, method)]
        for row in chosen(rows, method="single")[:1]:
            alone = [r["last"] for r in chosen(rows, method=row["case"]["method"])]
            axes.axhline(mean(alone), color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                f"one process {mean(alone):.1f} %", (1, mean(alone)), xycoords=("axes fraction", "data"),
                xytext=(-4, 4), textcoords="offset points", ha="right", color=GREY, fontsize=10,
            )  # fmt: skip
        ticks = distinct(rows, key)
        ticks = [tick for tick in ticks if tick > 1] if key == "workers" else ticks
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(True, axis="y")
        axes.set(xlabel=axis, ylabel="test accuracy, last evaluation, %", xlim=(ticks[0] / 1.1, ticks[-1] * 1.45))
        _label(axes, ends)
        _title(figure, content, key)
        figure.savefig(path, dpi=150)
    return path


def _has(rows: Sequence[dict[str, Any]], method: str) -> bool:
    return any(row["case"]["method"] == method for row in rows)


def _curve(axes: Axes, rows: list[dict[str, Any]], method: str, key: str) -> tuple[float, float, str, str]:
    """Mean and spread over seeds, and each seed as a dot; returns end, name and colour for the label."""
    own = chosen(rows, method=method)
    places = distinct(own, key)
    found = [[row["last"] for row in chosen(own, **{key: place})] for place in places]
    centre, sway = [mean(values) for values in found], [pstdev(values) for values in found]
    colour = COLOURS[method]
    axes.errorbar(places, centre, yerr=sway, color=colour, marker="o", markersize=5, capsize=3, elinewidth=1.2)
    for place, values in zip(places, found, strict=True):
        axes.plot([place] * len(values), values, "o", color=colour, markersize=3, alpha=0.45, linestyle="none")
    return places[-1], centre[-1], TITLES[method], colour


def _label(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the ends of the curves, moved apart where two ends are close."""
    axes.figure.canvas.draw()
    above = float("inf")
    for place, value, name, colour in sorted(ends, key=lambda end: -end[1]):
        own = axes.transData.transform((place, value))[1] * 72 / axes.figure.dpi
        placed = min(own, above - 15)
        above = placed
        axes.annotate(
            f"{name} {value:.1f}", (place, value), xytext=(10, placed - own), textcoords="offset points",
            va="center", color=colour, fontweight="bold",
        )  # fmt: skip


def _title(figure: Figure, content: Content, key: str) -> None:
    settings, rows = content["settings"], content["rows"]
    seeds = len({row["case"]["seed"] for row in rows})
    figure.suptitle(
        f"Accuracy by {'number of workers' if key == 'workers' else 'local steps per round, S = 2'}, equal samples",
        x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.axes[0].set_title(
        f"{SETS[settings['data']]}, {max(row['samples'] for row in rows):,} samples; mean, spread and single runs of "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        loc="left", fontsize=10.5, color=GREY,
    )  # fmt: skip

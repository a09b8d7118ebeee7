"""Two pictures: accuracy by the number of workers, and what a worker holds."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.accuracy.tables import distinct, values
from experiments.harness.figures import BLACK, BLUE, GREEN, GREY, INK, ORANGE, SKY, STYLE
from experiments.harness.words import bytes_in_words
from experiments.ist.memory import closed_form
from experiments.ist.tables import TITLES, Content, read, usual

COLOURS = {"ddp": GREEN, "local_sgd": ORANGE, "ist": BLUE}


def draw_all(folder: Path) -> list[Path]:
    """Draw what the result files of ``folder`` allow; returns the pictures."""
    drawn = []
    for name, draw in (("accuracy", _draw_accuracy), ("memory", _draw_memory)):
        content = read(name, folder)
        if content:
            with mpl.rc_context(STYLE):
                drawn.append(draw(folder / f"{name}.png", content))
    return drawn


def _draw_accuracy(path: Path, content: Content) -> Path:
    tasks = distinct(content["rows"], "task")
    figure = panels_of(len(tasks))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method, colour in COLOURS.items():
            _errorbars(axes, content["rows"], {"task": task, "method": method}, colour, TITLES[method])
        finished = {"task": task, "method": "ist", "finish": True}
        _errorbars(axes, content["rows"], finished, SKY, "IST, last tenth as local SGD")
        alone = values(usual(content["rows"], task=task, method="single", workers=1), "last")
        axes.axhline(mean(alone), color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), label="one process")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(True, axis="y")
        axes.set(xlabel="workers S", ylabel="test accuracy, %")
        axes.set_title(task, loc="left", fontsize=12, fontweight="bold", color=INK)
    return saved(figure, path, "IST, local SGD and DDP on equal samples")


def _errorbars(axes: Axes, rows: list[dict[str, Any]], which: dict[str, Any], colour: str, label: str) -> None:
    found = {}
    for workers in sorted({row["case"]["workers"] for row in usual(rows, **which)}):
        found[workers] = values(usual(rows, workers=workers, **which), "last")
    means, spreads = [mean(own) for own in found.values()], [pstdev(own) for own in found.values()]
    axes.errorbar(list(found), means, spreads, color=colour, label=label, marker="o", markersize=5, capsize=3)


def _draw_memory(path: Path, content: Content) -> Path:
    widths = list(dict.fromkeys(group["width"] for group in content["groups"]))
    figure = panels_of(len(widths))
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        groups = [group for group in content["groups"] if group["width"] == width]
        workers = [group["workers"] for group in groups]
        forms = [closed_form(group) for group in groups]
        measured = [[worker["steps"][-1] for worker in group["by_worker"]] for group in groups]
        held = [max(step["parameters"] + step["gradients"] + step["momentum"] for step in steps) for steps in measured]
        inner = [max(step["inner"] for step in steps) for steps in measured]
        for colour, label, points, key in (
            (BLUE, "parameters, gradients, momentum", held, "held"),
            (ORANGE, "of them the inner matrices: 1/S²", inner, "inner"),
        ):
            axes.plot(workers, [form[key] for form in forms], color=colour, linewidth=1.4)
            axes.plot(workers, points, "o", color=colour, markersize=7, label=label)
        stored = [(n, max(step["store"] for step in steps)) for n, steps in zip(workers, measured, strict=True)]
        stored = [(count, size) for count, size in stored if size]
        axes.plot(
            [n for n, _ in stored], [size for _, size in stored], "s", color=BLACK, label="store on the host: 1/S"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(workers, [str(count) for count in workers])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_in_words(value)))
        axes.grid(True, axis="y")
        axes.set(xlabel="workers S", ylabel="held by a worker (logarithmic)")
        axes.set_title(f"hidden width {width}", loc="left", fontsize=12, fontweight="bold", color=INK)
    return saved(figure, path, "What a worker of IST holds: points measured, lines by closed form")


def panels_of(count: int) -> Figure:
    """A figure for so many axes side by side."""
    figure = Figure(figsize=(max(9, 5.5 * count), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def saved(figure: Figure, path: Path, title: str) -> Path:
    """Write a figure with its title and the legend of its first axes; returns the path."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.savefig(path, dpi=150)
    return path

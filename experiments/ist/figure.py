"""Two pictures: accuracy by the number of workers, and the memory of a worker."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from experiments.harness.figures import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, draw_spread, panels
from experiments.harness.tables import Content, Rows, distinct, grouped, read, values
from experiments.harness.words import bytes_in_words
from experiments.ist.memory import closed_form
from experiments.ist.tables import TITLES, usual

COLOURS = {"ddp": GREEN, "local_sgd": ORANGE, "ist": BLUE}


def draw_all(folder: Path) -> list[Path]:
    """Draw the pictures for which ``folder`` has result files; returns their paths."""
    pictures = []
    accuracy, memory = read(folder, "accuracy"), read(folder, "memory")
    if accuracy and _tasks(accuracy):
        pictures.append(_accuracy(folder / "accuracy.png", accuracy))
    if memory:
        pictures.append(_memory(folder / "memory.png", memory))
    return pictures


def _tasks(content: Content) -> list[str]:
    """Tasks that several workers have trained: a single process is a line beside them."""
    drawn = usual(content["rows"]) + usual(content["rows"], shares="0.5")
    return distinct([row for row in drawn if row["case"]["method"] != "single"], "task")


def _accuracy(path: Path, content: Content) -> Path:
    rows, tasks = content["rows"], _tasks(content)
    with panels(path, tasks, "IST, local SGD and DDP on equal samples") as all_axes:
        for axes, task in zip(all_axes, tasks, strict=True):
            for method, colour in COLOURS.items():
                label = "IST, one holder for each neuron" if method == "ist" else TITLES[method]
                _errorbars(axes, rows, {"task": task, "method": method}, colour, label)
            # With two workers each has half anyway.
            half = {"task": task, "method": "ist", "shares": "0.5"}
            _errorbars(axes, rows, half, SKY, "IST, half of the neurons each (min_share=0.5)")
            alone = values(usual(rows, task=task, method="single", workers=1), "last")
            if alone:
                axes.axhline(mean(alone), color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), label="one process")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.grid(True, axis="y")
            axes.set(xlabel="workers S", ylabel="test accuracy, %")
    return path


def _errorbars(axes: Axes, rows: Rows, which: dict[str, Any], colour: str, label: str) -> None:
    found = {workers: values(own, "last") for (workers,), own in grouped(usual(rows, **which), "workers")}
    draw_spread(axes, found, color=colour, label=label, marker="o", markersize=5)


def _memory(path: Path, content: Content) -> Path:
    widths = list(dict.fromkeys(group["width"] for group in content["groups"]))
    titles = [f"hidden width {width}" for width in widths]
    with panels(path, titles, "What a worker of IST holds: points measured, lines by closed form") as all_axes:
        for axes, width in zip(all_axes, widths, strict=True):
            _held(axes, [group for group in content["groups"] if group["width"] == width])
    return path


def _held(axes: Axes, groups: list[Any]) -> None:
    workers = [group["workers"] for group in groups]
    held, inner, stored = [], [], []
    for group in groups:
        last = [worker["steps"][-1] for worker in group["by_worker"]]
        held.append(max(step["parameters"] + step["gradients"] + step["momentum"] for step in last))
        inner.append(max(step["inner"] for step in last))
        # One worker stores nothing, and 0 has no place on a logarithmic axis.
        stored.append(max(step["store"] for step in last) or float("nan"))
    for colour, label, points, key in (
        (BLUE, "parameters, gradients, momentum", held, "held"),
        (ORANGE, "of them the inner matrices: 1/S²", inner, "inner"),
    ):
        axes.plot(workers, [closed_form(group)[key] for group in groups], color=colour, linewidth=1.4)
        axes.plot(workers, points, "o", color=colour, markersize=7, label=label)
    axes.plot(workers, stored, "s", color=BLACK, label="store on the host: 1/S")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(workers, [str(count) for count in workers])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_in_words(value)))
    axes.grid(True, axis="y")
    axes.set(xlabel="workers S", ylabel="held by a worker (logarithmic)")

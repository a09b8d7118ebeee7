"""Pictures: test accuracy by method, seconds of a step, also over links, and who computes and who waits in it."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.accuracy.tables import chosen, distinct
from experiments.app.timeline_figure import draw_timeline
from experiments.auxnet.link_tables import by_link, methods_of
from experiments.auxnet.tables import read
from experiments.auxnet.words import TITLES, title
from experiments.harness.figures import BLACK, BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, STYLE, VERMILION
from experiments.ist.figure import panels_of, saved
from experiments.links.tables import bandwidth

COLOURS = {
    "serial": GREY, "penalty": BLUE, "al-net": SKY, "hybrid": PURPLE, "penalty-store": ORANGE, "al-store": VERMILION,
    "pipeline": GREEN, "serial-stages": BLACK,
}  # fmt: skip
BESIDE = 0.1
"""Distance of the methods from each other, in workers."""


def draw_all(folder: Path) -> list[Path]:
    """Draw what the result files of ``folder`` allow; returns the pictures."""
    drawn = []
    for name, draw in (("accuracy", _draw_accuracy), ("timing", _draw_timing), ("links", _draw_links)):
        content = read(name, folder)
        if content:
            with mpl.rc_context(STYLE):
                drawn.append(draw(folder / f"{name}.png", content))
    return drawn + _draw_timelines(folder, read("timing", folder))


def _draw_timelines(folder: Path, content: dict[str, Any] | None) -> list[Path]:
    """Of the penalty method, the last step of the first training of each network."""
    drawn = []
    rows = chosen(content["rows"], method="penalty") if content else []
    for task in distinct(rows, "task"):
        timeline = chosen(rows, task=task)[0]["timeline"]
        if timeline:
            drawn.append(draw_timeline(folder / f"timeline_{task}.png", timeline, f"One step of {task}"))
    return drawn


def _draw_accuracy(path: Path, content: dict[str, Any]) -> Path:
    rows = content["rows"]
    tasks = distinct(rows, "task")
    figure = panels_of(len(tasks))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = chosen(rows, task=task)
        for augment, style in ((True, "-"), (False, "--")):
            alone = [row["last"] for row in chosen(own, method="serial", augment=augment)]
            words = TITLES["serial"] + ("" if augment else ", no augmentation")
            if alone:
                axes.axhline(mean(alone), color=GREY, linewidth=1.2, linestyle=style, label=words)
        several = [row for row in own if row["case"]["workers"] > 1]  # alone, every method is the line
        for place, method in enumerate(names := distinct(several, "method")):
            shift = BESIDE * (place - (len(names) - 1) / 2)
            _errorbars(axes, chosen(several, method=method), shift, COLOURS[method], TITLES[method])
        axes.grid(True, axis="y")
        workers = distinct(several, "workers")
        axes.set(xlabel="workers K", ylabel="test accuracy, %", xticks=workers)
        axes.set_xlim(min(workers) - 0.5, max(workers) + 0.5)
        axes.set_title(task, loc="left", fontsize=12, fontweight="bold", color=INK)
    return saved(figure, path, "Test accuracy of the full model")


def _errorbars(axes: Axes, rows: list[dict[str, Any]], shift: float, colour: str, label: str) -> None:
    found = {workers: [row["last"] for row in chosen(rows, workers=workers)] for workers in distinct(rows, "workers")}
    means, spreads = [mean(own) for own in found.values()], [pstdev(own) for own in found.values()]
    places = [workers + shift for workers in found]
    axes.errorbar(places, means, spreads, color=colour, label=label, fmt="o", markersize=6, capsize=3)


def _draw_timing(path: Path, content: dict[str, Any]) -> Path:
    rows = content["rows"]
    tasks = distinct(rows, "task")
    figure: Figure = panels_of(len(tasks))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = chosen(rows, task=task)
        names = [
            (method, schedule) for method in TITLES for schedule in distinct(chosen(own, method=method), "schedule")
        ]
        for place, (method, schedule) in enumerate(names):
            these = [1000 * row["step_seconds"] for row in chosen(own, method=method, schedule=schedule)]
            words = TITLES[method] if schedule in (None, "gpipe") else "_"
            axes.barh(place, mean(these), color=COLOURS[method], label=words)
        axes.set_yticks(range(len(names)), [schedule or method for method, schedule in names])
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds per step")
        axes.set_title(task, loc="left", fontsize=12, fontweight="bold", color=INK)
    return saved(figure, path, "Time of a step, two workers on two cores")


def _draw_links(path: Path, content: dict[str, Any]) -> Path:
    rows = content["rows"]
    tasks = distinct(rows, "task")
    figure = panels_of(len(tasks))
    places = [gbit for gbit, _ in by_link(rows)]
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method, schedule, own in methods_of(chosen(rows, task=task)):
            found = [
                (places.index(gbit), 1000 * median(row["step_seconds"] for row in these))
                for gbit, these in by_link(own)
            ]
            words, colour = title(method, schedule), COLOURS[method]
            if method == "serial":
                axes.axhline(found[0][1], color=colour, linewidth=1.2, label=words)
            else:
                style = "--" if schedule == "1f1b" else "-"
                axes.plot(*zip(*found, strict=True), style, color=colour, marker="o", label=words)
        axes.set_xticks(range(len(places)), [bandwidth(gbit) for gbit in places])
        axes.set(xlabel="link", ylabel="milliseconds per step", ylim=(0, None))
        axes.grid(True, axis="y")
        axes.set_title(task, loc="left", fontsize=12, fontweight="bold", color=INK)
    return saved(figure, path, "Time of a step over links, two workers")

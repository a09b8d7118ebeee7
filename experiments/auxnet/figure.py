"""Pictures: test accuracy by method, seconds of a step, also over links, and a timeline of it."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

from matplotlib.axes import Axes

from experiments.app.timeline_figure import draw_timeline
from experiments.auxnet.cases import TITLES, title
from experiments.auxnet.link_tables import by_link, methods_of
from experiments.harness.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    draw_spread,
    panels,
)
from experiments.harness.tables import Content, Rows, chosen, distinct, grouped, read, values
from experiments.links.tables import bandwidth

COLOURS = {
    "serial": GREY, "penalty": BLUE, "al-net": SKY, "hybrid": PURPLE, "penalty-store": ORANGE, "al-store": VERMILION,
    "pipeline": GREEN, "serial-stages": BLACK, "delayed": YELLOW, "delayed-warm": BLACK,
}  # fmt: skip
BESIDE = 0.1  # distance of the methods from each other, in workers
LEAST_POINTS = 3  # minimum span of an axis of accuracies, so that small differences are not exaggerated


def draw_all(folder: Path) -> list[Path]:
    """Draw the pictures for which ``folder`` has result files; returns their paths."""
    pictures = []
    for name, heading, draw in (
        ("accuracy", "Test accuracy of the full model", _accuracy),
        ("timing", "Time of a step, two workers on two cores", _timing),
        ("links", "Time of a step over links, two workers", _links),
    ):
        content = read(folder, name)
        if content:
            tasks = distinct(content["rows"], "task")
            pictures.append(folder / f"{name}.png")
            with panels(pictures[-1], tasks, heading) as all_axes:
                for axes, task in zip(all_axes, tasks, strict=True):
                    draw(axes, chosen(content["rows"], task=task))
    return pictures + _timelines(folder, read(folder, "timing"))


def _timelines(folder: Path, content: Content | None) -> list[Path]:
    """Draw the last step of each network's first training by the penalty method."""
    pictures = []
    rows = chosen(content["rows"], method="penalty") if content else []
    for task in distinct(rows, "task"):
        timeline = chosen(rows, task=task)[0]["timeline"]
        if timeline:
            pictures.append(draw_timeline(folder / f"timeline_{task}.png", timeline, f"One step of {task}"))
    return pictures


def _accuracy(axes: Axes, rows: Rows) -> None:
    for augment, style in ((True, "-"), (False, "--")):
        alone = values(chosen(rows, method="serial", augment=augment), "last")
        words = TITLES["serial"] + ("" if augment else ", no augmentation")
        if alone:
            axes.axhline(mean(alone), color=GREY, linewidth=1.2, linestyle=style, label=words)
    several = [row for row in rows if row["case"]["workers"] > 1]  # alone, every method is the line
    for number, method in enumerate(names := distinct(several, "method")):
        shift = BESIDE * (number - (len(names) - 1) / 2)
        own = grouped(chosen(several, method=method), "workers")
        found = {workers + shift: values(rows, "last") for (workers,), rows in own}
        draw_spread(axes, found, color=COLOURS[method], label=TITLES[method], fmt="o", markersize=6)
    low, high = axes.get_ylim()
    more = max(0.0, LEAST_POINTS - (high - low)) / 2
    axes.set_ylim(low - more, high + more)
    axes.grid(True, axis="y")
    workers = distinct(several, "workers") or [1]
    axes.set(xlabel="workers K", ylabel="test accuracy, %", xticks=workers)
    axes.set_xlim(min(workers) - 0.5, max(workers) + 0.5)


def _timing(axes: Axes, rows: Rows) -> None:
    names = []
    for place, ((method, schedule), own) in enumerate(methods_of(rows)):
        words = TITLES[method] if schedule in (None, "gpipe") else "_"
        axes.barh(place, mean(1000 * row["step_seconds"] for row in own), color=COLOURS[method], label=words)
        names.append(schedule or method)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()  # the first method on top
    axes.set(xlabel="milliseconds per step")


def _links(axes: Axes, rows: Rows) -> None:
    places = [gbit for gbit, _ in by_link(rows)]
    for (method, schedule), own in methods_of(rows):
        found = {places.index(gbit): 1000 * median(values(these, "step_seconds")) for gbit, these in by_link(own)}
        words, colour = title(method, schedule), COLOURS[method]
        if method == "serial":  # it sends nothing
            axes.axhline(*found.values(), color=colour, linewidth=1.2, label=words)
        else:
            style = "--" if schedule == "1f1b" else "-"
            axes.plot(list(found), list(found.values()), style, color=colour, marker="o", label=words)
    axes.set_xticks(range(len(places)), [bandwidth(gbit) for gbit in places])
    axes.set(xlabel="link", ylabel="milliseconds per step", ylim=(0, None))
    axes.grid(True, axis="y")

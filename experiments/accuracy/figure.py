"""Two pictures: accuracy over the number of workers, and over the local steps per round."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes

from experiments.accuracy.cases import TITLES
from experiments.accuracy.tables import SETS
from experiments.harness.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    draw_spread,
    drawn,
    label_ends,
)
from experiments.harness.tables import Content, Rows, chosen, distinct, grouped, read, seeds, values

# The horizontal variable of a picture, in its title and at its axis.
WORDS = {
    "workers": ("number of workers", "workers S"), "local_steps": ("local steps per round, S = 2", "local steps per round"),
}  # fmt: skip
COLOURS = {
    "resist": BLUE,
    "resist_outer": SKY,
    "resist_growth": YELLOW,
    "local_sgd": ORANGE,
    "diloco": PURPLE,
    "post_local": VERMILION,
    "ddp": GREEN,
    "single": GREY,
}


def draw_all(folder: Path) -> list[Path]:
    """Draw the pictures for which ``folder`` has result files; returns their paths."""
    found = [(key, read(folder, name)) for name, key in (("main", "workers"), ("local_steps", "local_steps"))]
    return [
        _draw(folder / f"accuracy_by_{key}.png", content, key)
        for key, content in found
        if content and set(distinct(content["rows"], "method")) - {"single"}  # which is a line beside the others
    ]


def _draw(path: Path, content: Content, key: str) -> Path:
    rows, many = content["rows"], seeds(content["rows"])
    what, axis = WORDS[key]
    said = (
        f"{SETS[content['settings']['data']]}, {max(row['samples'] for row in rows):,} samples; mean, spread and single "
        f"runs of {many} seed{'s' if many > 1 else ''}"
    )
    with drawn(path, 9, 4.8, f"Accuracy by {what}, equal samples", said) as figure:
        axes = figure.add_subplot()
        present = [method for method in COLOURS if method != "single" and chosen(rows, method=method)]
        ends = [_curve(axes, chosen(rows, method=method), key) for method in present]
        alone = values(chosen(rows, method="single"), "last")
        if alone:
            axes.axhline(mean(alone), color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                f"one process {mean(alone):.1f} %", (1, mean(alone)), xycoords=("axes fraction", "data"),
                xytext=(-4, 4), textcoords="offset points", ha="right", color=GREY, fontsize=10,
            )  # fmt: skip
        ticks = [tick for tick in distinct(rows, key) if key != "workers" or tick > 1]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(True, axis="y")
        # Room at the right for the names at the ends of lines.
        axes.set(xlabel=axis, ylabel="test accuracy, last evaluation, %", xlim=(ticks[0] / 1.1, ticks[-1] * 1.45))
        label_ends(axes, ends, gap=15)
    return path


def _curve(axes: Axes, rows: Rows, key: str) -> tuple[float, float, str, str]:
    """Mean and spread over seeds, and each seed as a dot; returns place, value, name and colour of the end."""
    method = rows[0]["case"]["method"]
    colour = COLOURS[method]
    found = {place: values(own, "last") for (place,), own in grouped(rows, key)}
    *_, last = draw_spread(axes, found, color=colour, marker="o", markersize=5, elinewidth=1.2)
    for place, single in found.items():
        axes.plot([place] * len(single), single, "o", color=colour, markersize=3, alpha=0.45, linestyle="none")
    return max(found), last, f"{TITLES[method]} {last:.1f}", colour

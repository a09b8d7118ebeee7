"""The pictures of a run: the holders of blocks, loss and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.app.results import Curve
from experiments.harness.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW, drawn
from experiments.harness.words import run_in_words

WORKER_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK)
Rounds = Sequence[Sequence[Sequence[int]]]  # for each round and worker, the blocks it held

SHOWN_ROUNDS = 60


def draw_partition(path: Path, summary: Mapping[str, Any]) -> Path:
    """Draw the holders of each block in each round; of a long run, in the first rounds.

    Few workers that share no block: one map of blocks over rounds, coloured by holder. Otherwise: a map per worker.
    """
    blocks = [name.removeprefix("net.") for name in summary["blocks"]]
    workers = summary["workers"]
    shown = summary["partitions"][:SHOWN_ROUNDS]
    title = f"Who held which block: {len(blocks)} blocks, {workers} workers"
    said = f"{_rounds(len(shown), summary)}{_moved(summary['partitions'])}"
    draw, width, height = _draw_holders, 10.0, 1.9 + 0.26 * len(blocks)
    shared = any(sum(map(len, held)) > len(blocks) for held in shown)
    if workers > 4 or shared:
        draw, width = _draw_workers, 13.0
        height = 1.5 + _pairs(workers) * max(0.8, 0.075 * len(blocks))
    with drawn(path, width, height, title, said) as figure:
        draw(figure, shown, blocks)
    return path


def _pairs(workers: int) -> int:
    """Number of rows of two maps each."""
    return (workers + 1) // 2


def _rounds(shown: int, summary: Mapping[str, Any]) -> str:
    """``the first 60 of 80 rounds of 20 local steps``."""
    some = "" if shown == summary["rounds"] else f"the first {shown} of "
    return f"{some}{summary['rounds']} rounds of {summary['local_steps_per_round']} local steps"


def _draw_holders(figure: Figure, shown: Rounds, blocks: Sequence[str]) -> None:
    axes = figure.add_subplot()
    for worker in range(len(shown[0])):
        _fill(axes, shown, worker, _colour(worker))
    axes.set_yticks(range(len(blocks)), blocks, fontsize=9)
    _round_axis(axes, len(shown), len(blocks))
    _worker_legend(axes, len(shown[0]))


def _worker_legend(axes: Axes, workers: int) -> None:
    handles = [Patch(color=_colour(worker), label=f"worker {worker}") for worker in range(workers)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1, handleheight=1)


def _draw_workers(figure: Figure, shown: Rounds, blocks: Sequence[str]) -> None:
    workers = len(shown[0])
    for worker in range(workers):
        axes = figure.add_subplot(_pairs(workers), 2, worker + 1)
        axes.set_facecolor("#F1F1F1")
        _fill(axes, shown, worker, _colour(worker))
        axes.set_yticks([0, len(blocks) - 1], [blocks[0], blocks[-1]], fontsize=8)
        axes.set_title(f"worker {worker}", loc="left", fontsize=10, pad=3)
        _round_axis(axes, len(shown), len(blocks))
        axes.label_outer()


def _fill(axes: Axes, shown: Rounds, worker: int, colour: str) -> None:
    cells = []
    for index, held in enumerate(shown):
        cells += [Rectangle((index + 0.5, block - 0.5), 1, 1) for block in held[worker]]
    axes.add_collection(PatchCollection(cells, facecolor=colour, edgecolor="white", linewidth=0.6))


def _round_axis(axes: Axes, rounds: int, blocks: int) -> None:
    axes.set(xlim=(0.5, rounds + 0.5), ylim=(blocks - 0.5, -0.5), xlabel="round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_neurons(path: Path, summary: Mapping[str, Any]) -> Path:
    """Draw the holders of neurons of the first divided layer, of some neurons in the first rounds."""
    neurons, workers = summary["neurons"], summary["workers"]
    holders, shown = neurons["holders"], neurons["shown"]
    some = "" if len(shown) == neurons["width"] else f"; one neuron in {shown[1]} is shown"
    changed: list[bool] = []
    for before, after in pairwise(holders):
        changed += [old != new for old, new in zip(before, after, strict=True)]
    moved = f"; each round, {sum(changed) / len(changed):.0%} of the neurons change hands" if changed else ""
    title = f"Who held which of the {neurons['width']} neurons of {neurons['layer']}"
    with drawn(path, 10, 5.2, title, f"{_rounds(len(holders), summary)}{some}{moved}") as figure:
        axes = figure.add_subplot()
        colours = ListedColormap([_colour(worker) for worker in range(workers)])
        rounds = [number + 0.5 for number in range(len(holders) + 1)]  # edges of cells: one more than cells
        rows = [number - 0.5 for number in range(len(shown) + 1)]
        cells = list(zip(*holders, strict=True))
        style = {"vmin": -0.5, "vmax": workers - 0.5, "edgecolors": "white", "linewidth": 0.4}
        axes.pcolormesh(rounds, rows, cells, cmap=colours, **style)
        axes.set_yticks([0, len(shown) - 1], [f"neuron {shown[0]}", f"neuron {shown[-1]}"], fontsize=9)
        _round_axis(axes, len(holders), len(shown))
        _worker_legend(axes, workers)
    return path


def _moved(partitions: Rounds) -> str:
    new: list[bool] = []
    for before, after in pairwise(partitions):
        for old, own in zip(before, after, strict=True):
            new += [block not in old for block in own]
    return f"; each round, {sum(new) / len(new):.0%} of a worker's blocks are new to it" if new else ""


def draw_accuracy(path: Path, curves: Mapping[str, Curve], results: Mapping[str, Any]) -> Path:
    """Loss and accuracy over local steps, with the steps where the learning rate fell."""

    def curve(name: str) -> Curve:
        return curves.get(name, Curve())

    raw, tested = curve("train/loss"), results["test"]["accuracy"]
    title = f"{run_in_words(results)}: test accuracy {tested:.1%}"
    with drawn(path, 11, 4.6, title, _rounds_in_words(results)) as figure:
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        loss_axes.plot(raw.steps, raw.values, color=SKY, alpha=0.4, linewidth=0.9)
        smooth = smoothed(raw)
        validation = curve("val/loss")
        _line(loss_axes, smooth, BLUE, _who_trained(results))
        _line(loss_axes, validation, ORANGE, "validation, full model", marker="o")
        # The axis ends at the first values: a single bad batch later would flatten all the rest.
        top = max([*smooth.values[:1], *validation.values[:1]], default=1)
        loss_axes.set(ylabel="cross entropy", ylim=(0, top * 1.05))

        _line(accuracy_axes, curve("train/acc"), BLUE, "")
        _line(accuracy_axes, curve("val/acc"), ORANGE, "", marker="o")
        accuracy_axes.axhline(tested, color=BLACK, linewidth=1.2, linestyle=(0, (4, 2)), label="test, full model")
        accuracy_axes.set(ylabel="accuracy", ylim=(None, 1.01))
        accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in (loss_axes, accuracy_axes):
            axes.grid(True, axis="y")
            axes.set(xlabel="local steps", xlim=(0, results["local_steps"]))
            _mark_rate_drops(axes, _rate(curves))
        figure.legend(loc="outside lower center", ncols=3)
    return path


def _who_trained(results: Mapping[str, Any]) -> str:
    if results["workers"] == 1:
        return "training"
    if results["strategy"] == "auxnet":
        guesses = results["stages"] is not None and results["stages"]["mismatch"]
        return "training, last stage fed by guesses" if guesses else "training"
    return "training, sub-network of worker 0" if results["strategy"] in ("resist", "ist") else "training, worker 0"


def smoothed(curve: Curve, reach: int = 7) -> Curve:
    """Mean over each point and up to ``reach`` neighbours on either side."""
    parts = [curve.values[max(0, i - reach) : i + reach + 1] for i in range(len(curve.values))]
    return Curve(curve.steps, [sum(part) / len(part) for part in parts])


def _line(axes: Axes, curve: Curve, colour: str, label: str, marker: str | None = None) -> None:
    if curve.steps:
        axes.plot(curve.steps, curve.values, color=colour, label=label, marker=marker, markersize=3)


def _rate(curves: Mapping[str, Curve]) -> Curve:
    return next((curve for name, curve in sorted(curves.items()) if name.startswith("lr-")), Curve())


def _mark_rate_drops(axes: Axes, rate: Curve) -> None:
    for step, before, after in zip(rate.steps[1:], rate.values, rate.values[1:], strict=False):
        if after < before:
            axes.axvline(step, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(
                f"learning rate {after:.2g}", (step, 0.5), xycoords=("data", "axes fraction"),
                xytext=(3, 0), textcoords="offset points", va="center", rotation=90, fontsize=8.5, color=GREY,
            )  # fmt: skip


def _rounds_in_words(results: Mapping[str, Any]) -> str:
    if results["local_steps"] is None:
        return ""
    if not results["rounds"]:
        return f"{results['local_steps']} steps"
    return f"{results['local_steps']} local steps in {results['rounds']} rounds"


def _colour(worker: int) -> str:
    return WORKER_COLOURS[worker % len(WORKER_COLOURS)]

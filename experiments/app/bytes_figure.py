"""The picture of the bytes of a run, over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.harness.figures import BLUE, GREY, ORANGE, STYLE, new_figure, save_figure, write_title
from experiments.harness.words import bytes_in_words, strategy_in_words
from resist_lightning.comm.bytes import TRAINING_KINDS

WITHOUT_AVERAGES = ("local_sgd", "auxnet")
"""Beside these, local SGD with the same rounds is itself, or means nothing."""
LABEL_GAP = 36
"""Least distance between two labels of lines, in points: two lines of text."""


def draw_bytes(path: Path, summary: Mapping[str, Any]) -> Path:
    """Bytes that worker 0 has sent by each step, beside what DDP and local SGD would have sent."""
    name, last = strategy_in_words(summary["strategy"]), summary["local_steps"]
    total = sum(summary["sent_bytes"].get(kind, [0])[0] for kind in TRAINING_KINDS)
    syncs = [step for step, _ in summary["sent_by_round"]]
    ours = ([*syncs, last], [*(sent for _, sent in summary["sent_by_round"]), total])
    averaged = [summary["local_sgd_bytes"] * (index + 1) / len(syncs) for index in range(len(syncs))]
    dense = [max(1, last * part // 200) for part in range(201)]
    lines = [
        (GREY, "DDP, by closed form", dense, [summary["ddp_bytes"] * step / last for step in dense]),
        (ORANGE, "local SGD, by closed form", [*syncs, last], [*averaged, summary["local_sgd_bytes"]]),
        (BLUE, f"{name}, measured", *ours),
    ]
    if summary["strategy"] in WITHOUT_AVERAGES:
        del lines[1]
    with mpl.rc_context(STYLE):
        figure = new_figure(10, 4.8)
        axes = figure.add_subplot()
        each_step = {GREY, BLUE} if summary["strategy"] == "auxnet" else {GREY}
        for colour, _, steps, sent in lines:
            axes.plot(steps, sent, color=colour, drawstyle="default" if colour in each_step else "steps-post")
            axes.plot(last, sent[-1], "o", color=colour, markersize=6, clip_on=False)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_in_words(value)))
        axes.grid(True, axis="y")
        axes.set(xlim=(0, last), xlabel="local steps", ylabel="sent by worker 0 so far (logarithmic)")
        write_title(figure, f"Bytes that one of {summary['workers']} workers sends", _savings(name, summary, total))
        _label_ends(figure, axes, last, [(colour, label, sent[-1]) for colour, label, _, sent in lines])
        return save_figure(figure, path)


def _label_ends(figure: Figure, axes: Axes, last: float, ends: Sequence[tuple[str, str, float]]) -> None:
    """Write each line's name at its right end, moved apart where two ends are close."""
    figure.draw_without_rendering()
    points_per_pixel = 72 / figure.dpi
    above = float("inf")
    for colour, label, value in sorted(ends, key=lambda end: -end[2]):
        own = axes.transData.transform((last, value))[1] * points_per_pixel
        placed = min(own, above - LABEL_GAP)
        above = placed
        axes.annotate(
            f"{label}\n{bytes_in_words(value)}", (last, value), xytext=(12, placed - own), va="center",
            textcoords="offset points", color=colour, fontweight="bold", fontsize=10.5, annotation_clip=False,
        )  # fmt: skip


def _savings(name: str, summary: Mapping[str, Any], total: float) -> str:
    if not total:
        return ""
    times = summary["ddp_bytes"] / total
    words = f"{name} sends {times:.3g} times less than DDP" if times >= 1 else (
        f"{name} sends {1 / times:.3g} times as much as DDP"
    )  # fmt: skip
    if summary["strategy"] in WITHOUT_AVERAGES:
        return words
    return f"{words} and {summary['local_sgd_bytes'] / total:.3g} times less than local SGD with the same rounds"

"""The picture of the bytes of a run, over its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter

from experiments.harness.figures import BLUE, GREY, ORANGE, drawn, label_ends
from experiments.harness.words import bytes_in_words, strategy_in_words
from resist_lightning.comm.byte_formulas import TRAINING_KINDS

WITHOUT_AVERAGES = ("local_sgd", "auxnet")  # for these, local SGD with the same rounds is identical, or means nothing


def draw_bytes(path: Path, summary: Mapping[str, Any]) -> Path:
    """Bytes that worker 0 has sent by each step, beside those of DDP and local SGD."""
    name = strategy_in_words(summary["strategy"])
    last = summary["local_steps"]
    total = sum(summary["sent_bytes"].get(kind, [0])[0] for kind in TRAINING_KINDS)
    syncs = [step for step, _ in summary["sent_by_round"]]
    measured = [sent for _, sent in summary["sent_by_round"]]
    averages = [summary["local_sgd_bytes"] * (index + 1) / len(syncs) for index in range(len(syncs))]
    dense = [max(1, last * part // 200) for part in range(201)]  # from 1, as 0 has no logarithm
    lines = [
        (GREY, "DDP, by closed form", dense, [summary["ddp_bytes"] * step / last for step in dense]),
        (ORANGE, "local SGD, by closed form", [*syncs, last], [*averages, summary["local_sgd_bytes"]]),
        (BLUE, f"{name}, measured", [*syncs, last], [*measured, total]),
    ]
    if summary["strategy"] in WITHOUT_AVERAGES:
        del lines[1]
    title = f"Bytes that one of {summary['workers']} workers sends"
    with drawn(path, 10, 4.8, title, _savings(name, summary, total)) as figure:
        axes = figure.add_subplot()
        each_step = {GREY, BLUE} if summary["strategy"] == "auxnet" else {GREY}
        for colour, _, steps, sent in lines:
            axes.plot(steps, sent, color=colour, drawstyle="default" if colour in each_step else "steps-post")
            axes.plot(last, sent[-1], "o", color=colour, markersize=6, clip_on=False)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_in_words(value)))
        axes.grid(True, axis="y")
        axes.set(xlim=(0, last), xlabel="local steps", ylabel="sent by worker 0 so far (logarithmic)")
        ends = [(last, sent[-1], f"{label}\n{bytes_in_words(sent[-1])}", colour) for colour, label, _, sent in lines]
        label_ends(axes, ends, gap=36)  # two lines of text
    return path


def _savings(name: str, summary: Mapping[str, Any], total: float) -> str:
    if not total:
        return ""
    times = summary["ddp_bytes"] / total
    words = f"{name} sends {times:.3g} times less than DDP"
    if times < 1:
        words = f"{name} sends {1 / times:.3g} times as much as DDP"
    if summary["strategy"] in WITHOUT_AVERAGES:
        return words
    return f"{words} and {summary['local_sgd_bytes'] / total:.3g} times less than local SGD with the same rounds"

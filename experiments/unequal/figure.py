"""The picture of the unequal workers: the local step of each, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments.harness.figures import BLUE, GREY, INK, panels
from experiments.harness.tables import Content
from experiments.unequal.tables import chosen

COLOURS = {"equal": GREY, "auto": BLUE}
LABELS = {"equal": "equal shares", "auto": 'blocks_per_worker="auto", after measuring'}


def draw_steps(path: Path, contents: Sequence[Content]) -> Path:
    """A panel per number of workers, two bars per worker; on them, its blocks. All wait for the highest bar."""
    titles = [f"{content['settings']['workers']} workers (on the bars: blocks)" for content in contents]
    with panels(path, titles, "The last worker is slow") as all_axes:
        for axes, content in zip(all_axes, contents, strict=True):
            for side, (shares, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                rows = chosen(content, shares)
                heights = [mean(times) for times in zip(*(row["step_seconds"] for row in rows), strict=True)]
                places = [worker + side for worker in range(len(heights))]
                bars = axes.bar(places, heights, width=0.38, color=colour, label=LABELS[shares])
                axes.bar_label(bars, [f"{count}" for count in rows[-1]["blocks"]], color=INK, fontsize=9.5, padding=2)
            cores = content["settings"]["cores"]
            axes.set_xticks(range(len(cores)), [f"worker {n}\n{share:.2g} core" for n, share in enumerate(cores)])
            axes.grid(True, axis="y")
        all_axes[0].set_ylabel("seconds per local step")
    return path

"""Draws docs/timeline.png from the real partition and plan: python docs/timeline.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from resist_lightning.schedule.partition import draw_partition
from resist_lightning.schedule.transfers import plan_sync

BLOCKS, WORKERS, MIN_BLOCKS, SEED, ROUNDS = 6, 3, 0, 1, 3
NAMES = "abcdef"
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
SHARED = "#B8BEC8"
ROUND_WIDTH, GAP, ROW = 3.0, 1.15, 1.0


def main() -> None:
    """Draw it."""
    figure, axes = plt.subplots(figsize=(10.5, 4.1), dpi=150)
    partitions = [draw_partition(BLOCKS, WORKERS, MIN_BLOCKS, SEED, round) for round in range(ROUNDS)]
    for round, partition in enumerate(partitions):
        for worker, held in enumerate(partition.held):
            _draw_worker(axes, round, worker, held)
        axes.text(_left(round) + ROUND_WIDTH / 2, 0.62, f"round {round}: local steps", ha="center")
    for round in range(ROUNDS - 1):
        _draw_sync(axes, round, partitions)
    for worker in range(WORKERS):
        axes.text(-0.15, -worker * ROW, f"worker {worker}", ha="right", va="center", weight="bold")
    axes.set_xlim(-1.2, _left(ROUNDS) - GAP + 0.1)
    axes.set_ylim(-WORKERS * ROW + 0.1, 0.95)
    axes.axis("off")
    axes.text(
        _left(0),
        -WORKERS * ROW + 0.28,
        f"{BLOCKS} partitioned blocks on {WORKERS} workers. At a sync, shared layers (grey) are averaged; a block goes "
        "straight\nfrom the worker that trained it to the one that trains it next; a block that stays is not sent.",
        fontsize=9,
        va="top",
    )
    figure.savefig(Path(__file__).with_name("timeline.png"), bbox_inches="tight")


def _left(round: int) -> float:
    return round * (ROUND_WIDTH + GAP)


def _slot(round: int, worker: int, position: int) -> tuple[float, float]:
    return _left(round) + 0.95 + position * 1.0, -worker * ROW


def _draw_worker(axes: Axes, round: int, worker: int, held: tuple[int, ...]) -> None:
    x, y = _left(round), -worker * ROW
    axes.add_patch(Rectangle((x, y - 0.28), 0.9, 0.56, color=SHARED))
    axes.text(x + 0.45, y, "shared", ha="center", va="center", fontsize=9)
    for position, block in enumerate(held):
        left, _ = _slot(round, worker, position)
        axes.add_patch(Rectangle((left, y - 0.28), 0.95, 0.56, color=COLOURS[block]))
        axes.text(left + 0.47, y, NAMES[block], ha="center", va="center", color="white", weight="bold")


def _draw_sync(axes: Axes, round: int, partitions: list) -> None:
    left = _left(round) + ROUND_WIDTH
    axes.add_patch(
        Rectangle(
            (left + 0.04, -(WORKERS - 1) * ROW - 0.36),
            GAP - 0.1,
            (WORKERS - 1) * ROW + 0.72,
            fill=False,
            ls=":",
            ec="#777",
        )
    )
    axes.text(left + GAP / 2, 0.62, "sync", ha="center", style="italic")
    axes.plot([left + GAP / 2] * 2, [0.3, -(WORKERS - 1) * ROW - 0.3], color=SHARED, lw=9, zorder=0)
    for transfer in plan_sync(partitions[round], partitions[round + 1]).hand_over:
        start = (left + 0.04, -transfer.source * ROW)
        end = (left + GAP - 0.06, -transfer.target * ROW)
        offset = 0.16 * (1 if transfer.block % 2 else -1)
        arrow = FancyArrowPatch(
            (start[0], start[1] + offset),
            (end[0], end[1] + offset),
            arrowstyle="-|>",
            mutation_scale=14,
            lw=2,
            color=COLOURS[transfer.block],
        )
        axes.add_patch(arrow)


if __name__ == "__main__":
    main()

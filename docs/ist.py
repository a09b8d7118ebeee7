"""Draws docs/ist.png from the real partition and plan: python docs/ist.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import draw_neurons, kept_rows
from resist_lightning.methods.ist.plan import NeuronPlan, pieces
from resist_lightning.schedule.partition import Partition

ROWS, COLUMNS, WORKERS, SEED = 9, 9, 3, 4
COLOURS = ["#0072B2", "#D55E00", "#009E73"]
PALE = 0.78


def main() -> None:
    """Draw it."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.4), dpi=150)
    before, after = (draw_neurons((COLUMNS, ROWS), WORKERS, SEED, round) for round in (0, 1))
    _draw_round(axes[0], before, "round 0: who trains which entry")
    _draw_sync(axes[1], NeuronPlan(before, after), "sync: what is sent, and to whom")
    _draw_round(axes[2], after, "round 1")
    figure.text(
        0.5,
        0.03,
        f"The matrix between two hidden layers of {ROWS} neurons on {WORKERS} workers (three colours). Strong: trained "
        "by the worker that holds both neurons.\nPale: no worker has both; the entry waits at the keeper of its row, "
        "unchanged. Middle: white entries stay where they are; a frame is the colour of the receiver.",
        ha="center",
        fontsize=9,
    )
    figure.subplots_adjust(left=0.03, right=0.97, top=0.9, bottom=0.16, wspace=0.08)
    figure.savefig(Path(__file__).with_name("ist.png"))


def _draw_round(axes: Axes, held: tuple[Partition, ...], title: str) -> None:
    image = np.ones((ROWS, COLUMNS, 3))
    for worker, colour in enumerate(COLOURS):
        image[list(kept_rows(ROWS, WORKERS, worker))] = _pale(colour)
    for worker, colour in enumerate(COLOURS):
        image[np.ix_(held[1].held[worker], held[0].held[worker])] = to_rgb(colour)
    _show(axes, image, title)


def _draw_sync(axes: Axes, plan: NeuronPlan, title: str) -> None:
    image = np.ones((ROWS, COLUMNS, 3))
    for worker in range(WORKERS):
        for piece in pieces(Cut(1, 0), plan, worker):
            if piece.source != worker or piece.target == worker:
                continue
            colour = COLOURS[worker]
            assert piece.rows is not None
            assert piece.columns is not None
            image[np.ix_(piece.rows, piece.columns)] = to_rgb(colour) if piece.leaves == "slice" else _pale(colour)
            for row in piece.rows:
                for column in piece.columns:
                    edge = COLOURS[piece.target]
                    axes.add_patch(Rectangle((column - 0.38, row - 0.38), 0.76, 0.76, fill=False, color=edge, lw=2.2))
    _show(axes, image, title)


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image)
    axes.set_title(title, fontsize=11)
    axes.set_xticks(np.arange(-0.5, COLUMNS), [])
    axes.set_yticks(np.arange(-0.5, ROWS), [])
    axes.grid(color="white", linewidth=1.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _pale(colour: str) -> tuple[float, ...]:
    return tuple(PALE + (1 - PALE) * part for part in to_rgb(colour))


if __name__ == "__main__":
    main()

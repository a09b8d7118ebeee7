"""Draws the holders of each block in some rounds. Needs matplotlib, which is imported when it draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resist_lightning.methods.resist.layout import BlockLayout

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHARED, _ABSENT = "#B8BEC8", "#F1F2F4"
_MOST_WORKERS, _MOST_LABELS = 16, 40


def draw_partition(layout: BlockLayout, rounds: int = 3, first: int | None = None) -> Figure:
    """A grid for each of some rounds: a row for each worker, a column for each block.

    Args:
        layout: the blocks and their holders.
        rounds: number of rounds.
        first: the first of them; None: the one after the warm-up.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install matplotlib") from error
    names = [block.name for block in layout.blocks]
    colours = _colours([block.section for block in layout.blocks])
    workers = min(layout.workers, _MOST_WORKERS)
    group = workers + 0.5
    height = rounds * group
    shared = max(2.0, len(names) / 10)
    width = shared + len(names)
    inches = min(max(6.0, 0.33 * width + 2.5), 16.0)
    figure = Figure(figsize=(inches, 0.3 * height + 1.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    total = sum(parameter.numel() for parameter in layout.module.parameters())
    for index in range(rounds):
        round = (layout.config.warmup_rounds if first is None else first) + index
        held = layout.partition(round).held
        parameters = layout.held_parameters(round)
        for worker in range(workers):
            y = index * group + worker
            axes.barh(y, shared - 0.1, left=0, height=0.8, color=_SHARED)
            for block in range(len(names)):
                colour = colours[block] if block in held[worker] else _ABSENT
                axes.barh(y, 0.9, left=shared + block, height=0.8, color=colour)
            axes.text(-0.2, y, f"round {round}, worker {worker}", ha="right", va="center", fontsize=8)
            share = parameters[worker] / max(total, 1)
            axes.text(width + 0.2, y, f"{share:.0%}", ha="left", va="center", fontsize=8)
    axes.text(shared / 2, -0.7, "shared", ha="center", va="bottom", rotation=90, fontsize=7)
    step = -(-len(names) // _MOST_LABELS)
    for block in range(0, len(names), max(step, 1)):
        axes.text(shared + block + 0.45, -0.7, names[block], ha="center", va="bottom", rotation=90, fontsize=7)
    axes.text(width + 0.2, -0.7, "parameters\nheld", ha="left", va="bottom", fontsize=7)
    left_out = f"; workers from {workers} on are left out" if workers < layout.workers else ""
    figure.suptitle(f"{len(names)} partitioned blocks on {layout.workers} worker(s){left_out}", fontsize=10)
    axes.set_xlim(-0.1, width)
    axes.set_ylim(height - 0.9, -0.6)
    axes.axis("off")
    return figure


def _colours(sections: Sequence[str]) -> list[str]:
    """A colour for each block: that of its section."""
    order = list(dict.fromkeys(sections))
    return [_COLOURS[order.index(section) % len(_COLOURS)] for section in sections]

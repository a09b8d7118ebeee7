"""Counts the entries of a tensor that each worker sends at a sync, in closed form. Standard library only."""

from __future__ import annotations

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.plan import NeuronPlan
from resist_lightning.schedule.partition import Partition


def sent_entries(cut: Cut, plan: NeuronPlan) -> list[int]:
    """For each worker, how many (row, column) pairs of a tensor it sends at a sync, or rows where it has no columns.

    With neurons on one side, a worker sends those that it does not keep. With neurons on both sides it sends, of its
    slice, the entries of the next holder or the keeper of the row, and of its store, those that others begin to train.
    """
    if cut.rows is not None and cut.columns is not None:
        return _inner_entries(cut.rows, cut.columns, plan)
    layer = cut.rows if cut.rows is not None else cut.columns
    assert layer is not None
    before, after = plan.before[layer], plan.after[layer]
    sent = []
    for worker in range(before.workers):
        leaving = set(before.held[worker]) - set(after.held[worker])
        sent.append(len(leaving))
    return sent


def _inner_entries(row_layer: int, column_layer: int, plan: NeuronPlan) -> list[int]:
    rows, next_rows = plan.before[row_layer], plan.after[row_layer]
    columns, next_columns = plan.before[column_layer], plan.after[column_layer]
    moving = _overlaps(columns, next_columns)
    sent = []
    for worker in range(rows.workers):
        kept = kept_rows(rows.blocks, rows.workers, worker)
        entries = 0
        # From the slice: the columns that the next holder of the row trains too go to it, the others to the keeper.
        for row in rows.held[worker]:
            (target,) = next_rows.holders(row)
            going_along = moving[worker][target]
            if target != worker:
                entries += going_along
            if row not in kept:
                entries += len(columns.held[worker]) - going_along
        # From the store: columns that the next holder begins to train and the last holder did not have.
        for row in kept:
            (source,) = rows.holders(row)
            (target,) = next_rows.holders(row)
            if target != worker:
                entries += len(next_columns.held[target]) - moving[source][target]
        sent.append(entries)
    return sent


def _overlaps(before: Partition, after: Partition) -> list[list[int]]:
    """By old and new worker, how many neurons go from one to the other."""
    counts = [[0] * after.workers for _ in range(before.workers)]
    for neuron in range(before.blocks):
        (source,) = before.holders(neuron)
        (target,) = after.holders(neuron)
        counts[source][target] += 1
    return counts

"""Counts the entries of a tensor that each worker sends at a sync, in closed form. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.plan import NeuronPlan
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.transfers import Transfer


def sent_entries(cut: Cut, plan: NeuronPlan) -> list[int]:
    """For each worker, the number of (row, column) pairs of a tensor that it sends; of neurons, if one side is whole.

    With neurons on one side, a worker sends those that it does not keep. With neurons on both sides it sends entries of
    its slice to the next holder or the keeper of the row, and entries of its store that others begin to train.
    Where neurons have several holders it sends, after the means, the neurons that it owns to each of their next
    holders, and all entries of its store that others will hold.
    """
    if cut.rows is not None and cut.columns is not None:
        if plan.several_holders:
            return _kept_by_others(cut.rows, cut.columns, plan.after, from_keepers=True)
        return _inner_entries(cut.rows, cut.columns, plan)
    if plan.several_holders:
        return _sent_by(plan.owners[cut.layer].hand_over, plan)
    before, after = plan.before[cut.layer], plan.after[cut.layer]
    sent = []
    for worker in range(before.workers):
        leaving = set(before.held[worker]) - set(after.held[worker])
        sent.append(len(leaving))
    return sent


def merged_entries(cut: Cut, plan: NeuronPlan) -> list[int]:
    """Like :func:`sent_entries`, for the merge before it, which takes means where neurons have several holders."""
    if not plan.several_holders:
        return [0] * plan.before[0].workers
    if cut.rows is not None and cut.columns is not None:
        return _kept_by_others(cut.rows, cut.columns, plan.before, from_keepers=False)
    return _sent_by(plan.owners[cut.layer].merge, plan)


def _sent_by(transfers: Sequence[Transfer], plan: NeuronPlan) -> list[int]:
    sent = Counter(transfer.source for transfer in transfers)
    return [sent[worker] for worker in range(plan.before[0].workers)]


def _kept_by_others(row_layer: int, column_layer: int, held: Sequence[Partition], *, from_keepers: bool) -> list[int]:
    """Entries of slices whose row another worker keeps: counted at the holder, or at the keeper."""
    rows, columns = held[row_layer], held[column_layer]
    sent = [0] * rows.workers
    for holder in range(rows.workers):
        for keeper in range(rows.workers):
            if keeper != holder:
                kept = kept_rows(rows.blocks, rows.workers, keeper)
                entries = sum(row in kept for row in rows.held[holder]) * len(columns.held[holder])
                sent[keeper if from_keepers else holder] += entries
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
    """By old and new worker, the number of neurons that go from one to the other."""
    counts = [[0] * after.workers for _ in range(before.workers)]
    for neuron in range(before.blocks):
        (source,) = before.holders(neuron)
        (target,) = after.holders(neuron)
        counts[source][target] += 1
    return counts

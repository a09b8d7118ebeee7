"""Entries that a hand-over of neurons must send, by closed form. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.plan import NeuronPlan
from resist_lightning.schedule.partition import Partition


def sent_entries(cut: Cut, plan: NeuronPlan) -> list[int]:
    """For each worker, how many (row, column) pairs of a tensor it sends at a sync, or rows where it has no columns.

    With neurons on one side, a worker sends those that it does not keep. With neurons on both sides it sends, of its
    slice, what the next holder or the keeper of the row gets, and of its store, what others begin to train.
    """
    if cut.rows is None or cut.columns is None:
        layer = cut.rows if cut.rows is not None else cut.columns
        assert layer is not None
        before, after = plan.before[layer], plan.after[layer]
        return [len(set(old) - set(new)) for old, new in zip(before.held, after.held, strict=True)]
    rows, columns = (plan.before[cut.rows], plan.after[cut.rows]), (plan.before[cut.columns], plan.after[cut.columns])
    return [_inner(worker, rows, columns) for worker in range(rows[0].workers)]


def mean_entries(rows: int, columns: int, workers: int) -> float:
    """Entries of an inner matrix that one worker sends at a sync, in the mean over partitions.

    Of the rows * columns / S entries that are trained, 1 / S go straight to the next holder; the others go to their
    keeper, and as many come from one. The next place of 1 / S of all of these is where they are.
    """
    trained = rows * columns / workers
    return trained * (2 - 1 / workers) * (1 - 1 / workers) / workers


def _inner(worker: int, rows: tuple[Partition, Partition], columns: tuple[Partition, Partition]) -> int:
    held, held_next = _holders(rows[0]), _holders(rows[1])
    both = [
        [len(set(old) & set(new)) for new in columns[1].held] for old in columns[0].held
    ]  # columns that go from one worker to another
    kept = kept_rows(rows[0].blocks, rows[0].workers, worker)
    sent = 0
    for row in rows[0].held[worker]:
        target = held_next[row]
        if target != worker:
            sent += both[worker][target]
        if row not in kept:
            sent += len(columns[0].held[worker]) - both[worker][target]
    for row in kept:
        target = held_next[row]
        if target != worker:
            sent += len(columns[1].held[target]) - both[held[row]][target]
    return sent


def _holders(partition: Partition) -> Sequence[int]:
    """The worker that has each neuron."""
    holders = [0] * partition.blocks
    for worker, held in enumerate(partition.held):
        for neuron in held:
            holders[neuron] = worker
    return holders

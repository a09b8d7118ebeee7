"""Which entries of a matrix go where at a sync: a pure function of two partitions. Standard library only.

An entry is in the ``slice`` of the worker that holds its neurons, or, if no worker holds both, in the ``store`` of the
worker that keeps its row (:func:`~resist_lightning.methods.ist.partition.kept_rows`)::

                        columns that w will hold     the others
    columns that a held   slice a ──► slice w     slice a ──► store         of the rows that go
    the others            store   ──► slice w     stays in the store        from worker a to worker w
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.schedule.partition import Partition

Indices: TypeAlias = tuple[int, ...]
Frame: TypeAlias = Literal["slice", "store", "full"]
"""In which tensor of a worker entries are: in that of its subnet, in its store, or in that of the full model."""


@dataclass(frozen=True)
class Piece:
    """Rows x columns of a tensor on their way, by numbers of neurons in ascending order.

    Args:
        source: the worker that has them.
        target: the worker that will have them; it may be the same one.
        rows: neurons of dimension 0; None for all of it.
        columns: neurons of dimension 1; None for all of it.
        leaves: which tensor of the source they are in.
        enters: which tensor of the target they go to.
    """

    source: int
    target: int
    rows: Indices | None
    columns: Indices | None
    leaves: Frame = "slice"
    enters: Frame = "slice"


@dataclass(frozen=True)
class NeuronPlan:
    """What happens between two rounds.

    Args:
        before: the partitions of the hidden layers in the round that ends.
        after: those of the next round.
        left_out: workers whose values no mean has in it.
    """

    before: tuple[Partition, ...]
    after: tuple[Partition, ...]
    left_out: tuple[int, ...] = ()


def pieces(cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
    """What of a tensor leaves or reaches ``worker``, in an order that both ends of every pair agree upon."""
    workers = range(plan.before[0].workers)
    if cut.rows is None or cut.columns is None:
        found = _moves(cut, plan, worker, workers)
    else:
        found = _inner_moves(cut.rows, cut.columns, plan, worker, workers)
    return [piece for piece in found if worker in (piece.source, piece.target)]


def full_pieces(cut: Cut, before: Sequence[Partition], worker: int) -> list[Piece]:
    """What of a tensor every worker must get from ``worker`` to see it whole; the target is always 0.

    Args:
        cut: how it is divided.
        before: the partitions of the hidden layers in this round.
        worker: who sends it.
    """
    rows = before[cut.rows].held[worker] if cut.rows is not None else None
    columns = before[cut.columns].held[worker] if cut.columns is not None else None
    found = [Piece(worker, 0, rows, columns, enters="full")]
    if cut.rows is not None and cut.columns is not None:
        side = before[cut.columns]
        kept = set(kept_rows(before[cut.rows].blocks, side.workers, worker))
        for holder in range(side.workers):
            others = _without(range(side.blocks), side.held[holder])
            found.append(Piece(worker, 0, _common(before[cut.rows].held[holder], kept), others, "store", "full"))
    return [piece for piece in found if piece.rows != () and piece.columns != ()]


def _moves(cut: Cut, plan: NeuronPlan, worker: int, workers: range) -> Iterator[Piece]:
    """Of a tensor with hidden neurons on one side: they take all of it along."""
    layer = cut.rows if cut.rows is not None else cut.columns
    assert layer is not None
    for source, target in _pairs(worker, workers):
        moved = _common(plan.before[layer].held[source], set(plan.after[layer].held[target]))
        if moved:
            rows, columns = (moved, None) if cut.rows is not None else (None, moved)
            yield Piece(source, target, rows, columns)


def _inner_moves(row_layer: int, column_layer: int, plan: NeuronPlan, worker: int, workers: range) -> Iterator[Piece]:
    """Of a tensor with hidden neurons on both sides."""
    width = plan.before[row_layer].blocks
    keepers = [(keeper, set(kept_rows(width, len(workers), keeper))) for keeper in workers]
    for holder in workers:
        columns_before = plan.before[column_layer].held[holder]
        for next_holder in workers:
            rows = _common(plan.before[row_layer].held[holder], set(plan.after[row_layer].held[next_holder]))
            columns_after = plan.after[column_layer].held[next_holder]
            both = _common(columns_before, set(columns_after))
            if rows and both and worker in (holder, next_holder):
                yield Piece(holder, next_holder, rows, both)
            gone, new = _without(columns_before, both), _without(columns_after, both)
            for keeper, kept in keepers:
                if worker not in (holder, next_holder, keeper):
                    continue
                here = _common(rows, kept)
                if here and gone:
                    yield Piece(holder, keeper, here, gone, enters="store")
                if here and new:
                    yield Piece(keeper, next_holder, here, new, leaves="store")


def _pairs(worker: int, workers: range) -> list[tuple[int, int]]:
    """Those (source, target) that a worker takes part in."""
    return [(source, target) for source in workers for target in workers if worker in (source, target)]


def _common(indices: Sequence[int], others: set[int]) -> Indices:
    return tuple(index for index in indices if index in others)


def _without(indices: Sequence[int], others: Sequence[int]) -> Indices:
    taken = set(others)
    return tuple(index for index in indices if index not in taken)

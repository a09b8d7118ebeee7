"""Plans the moves of a tensor's entries at a sync: a pure function of two partitions. Standard library only.

An entry is in the ``slice`` of the worker that holds its neurons, or, if no worker holds both, in the ``store`` of the
worker that keeps its row (:func:`~resist_lightning.methods.ist.partition.kept_rows`)::

                        columns that w will hold     the others
    columns that a held   slice a ──► slice w     slice a ──► store         of the rows that go
    the others            store   ──► slice w     stays in the store        from worker a to worker w

Where neurons have several holders, :mod:`~resist_lightning.methods.ist.holders` plans instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.transfers import SyncPlan, plan_sync

Indices: TypeAlias = tuple[int, ...]
Frame: TypeAlias = Literal["slice", "store", "full"]
"""The tensor of a worker that contains entries: the subnet's, its store, or the full model's."""


@dataclass(frozen=True)
class Piece:
    """Rows x columns of a tensor that move together, by numbers of neurons in ascending order.

    Args:
        source: the worker that has them.
        target: the worker that will have them; it may be the same one.
        rows: neurons of dimension 0; None for all of it.
        columns: neurons of dimension 1; None for all of it.
        leaves: the tensor of the source that contains them.
        enters: the tensor of the target to which they go.
    """

    source: int
    target: int
    rows: Indices | None
    columns: Indices | None
    leaves: Frame = "slice"
    enters: Frame = "slice"


@dataclass(frozen=True)
class NeuronPlan:
    """The sync between two rounds.

    Args:
        before: the partitions of the hidden layers in the round that ends.
        after: those of the next round.
        left_out: workers whose values do not count in means.
    """

    before: tuple[Partition, ...]
    after: tuple[Partition, ...]
    left_out: tuple[int, ...] = ()

    @cached_property
    def several_holders(self) -> bool:
        """Whether some neuron has several holders before or after the sync."""
        return have_several_holders(self.before) or have_several_holders(self.after)

    @cached_property
    def owners(self) -> tuple[SyncPlan, ...]:
        """For each layer, the owner of each neuron, which takes the mean over its holders, and the transfers."""
        # Each neuron has an owner, even where all hold all: owners are spread, so this costs as much as an all-reduce.
        return tuple(
            plan_sync(before, after, self.left_out, all_reduce=False)
            for before, after in zip(self.before, self.after, strict=True)
        )


def have_several_holders(held: Sequence[Partition]) -> bool:
    """Whether some neuron has several holders."""
    return any(sum(map(len, layer.held)) > layer.blocks for layer in held)


def pieces(cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
    """The pieces of a tensor that leave or reach ``worker``, in the same order at both ends of every pair."""
    if cut.rows is not None and cut.columns is not None:
        moves = _inner_moves(cut.rows, cut.columns, plan, worker)
    else:
        moves = _moves(cut, plan, worker)
    return [piece for piece in moves if worker in (piece.source, piece.target)]


def own_slice(cut: Cut, held: Sequence[Partition], worker: int) -> Piece:
    """The slice of a tensor that ``worker`` has, as a piece that goes to the full tensor of worker 0."""
    rows = columns = None
    if cut.rows is not None:
        rows = held[cut.rows].held[worker]
    if cut.columns is not None:
        columns = held[cut.columns].held[worker]
    return Piece(worker, 0, rows, columns, enters="full")


def first_pieces(cut: Cut, held: Sequence[Partition], worker: int) -> list[Piece]:
    """The pieces of worker 0's full tensor that ``worker`` gets when the training starts.

    The same that it would send to make the tensor whole; where neurons have several holders, all of its store.
    """
    found = full_pieces(cut, held, worker)
    if have_several_holders(held) and cut.rows is not None and cut.columns is not None:
        layer = held[cut.rows]
        kept = tuple(kept_rows(layer.blocks, layer.workers, worker))
        found = [own_slice(cut, held, worker), Piece(worker, 0, kept, None, "store", "full")]
    return [replace(piece, source=0, target=worker, leaves="full", enters=piece.leaves) for piece in found]


def full_pieces(cut: Cut, before: Sequence[Partition], worker: int) -> list[Piece]:
    """The pieces of a tensor that ``worker`` sends to make it whole elsewhere; the target is a placeholder, 0."""
    found = [own_slice(cut, before, worker)]
    if cut.rows is not None and cut.columns is not None:
        row_layer, column_layer = before[cut.rows], before[cut.columns]
        kept = kept_rows(row_layer.blocks, row_layer.workers, worker)
        # For a row that this worker keeps, its store has the columns that the row's holder does not train.
        for holder in range(row_layer.workers):
            stored = common(row_layer.held[holder], kept)
            others = _without(range(column_layer.blocks), column_layer.held[holder])
            found.append(Piece(worker, 0, stored, others, "store", "full"))
    return [piece for piece in found if piece.rows != () and piece.columns != ()]


def _moves(cut: Cut, plan: NeuronPlan, worker: int) -> Iterator[Piece]:
    """A tensor with hidden neurons on one side: a neuron takes all of its row or column along."""
    before, after = plan.before[cut.layer], plan.after[cut.layer]
    for source in range(before.workers):
        for target in range(before.workers):
            if worker not in (source, target):
                continue
            moved = common(before.held[source], set(after.held[target]))
            # An empty piece would be an empty message.
            if not moved:
                continue
            rows = moved if cut.rows is not None else None
            columns = moved if cut.columns is not None else None
            yield Piece(source, target, rows, columns)


def _inner_moves(row_layer: int, column_layer: int, plan: NeuronPlan, worker: int) -> Iterator[Piece]:
    """A tensor with hidden neurons on both sides: its entries move between slices and stores."""
    rows_before, rows_after = plan.before[row_layer], plan.after[row_layer]
    columns_before, columns_after = plan.before[column_layer], plan.after[column_layer]
    workers = range(rows_before.workers)
    kept = [kept_rows(rows_before.blocks, len(workers), keeper) for keeper in workers]
    for holder in workers:
        for next_holder in workers:
            rows = common(rows_before.held[holder], set(rows_after.held[next_holder]))
            if not rows:
                continue
            old, new = columns_before.held[holder], columns_after.held[next_holder]
            # The columns of these rows: trained before and after, before only, after only.
            both = common(old, set(new))
            gone, begun = _without(old, both), _without(new, both)
            if both:
                yield Piece(holder, next_holder, rows, both)
            # A worker that is no holder of the rows takes part as their keeper only.
            keepers = workers if worker in (holder, next_holder) else (worker,)
            for keeper in keepers:
                here = common(rows, kept[keeper])
                if here and gone:
                    yield Piece(holder, keeper, here, gone, enters="store")
                if here and begun:
                    yield Piece(keeper, next_holder, here, begun, leaves="store")


def common(indices: Sequence[int], others: Collection[int]) -> Indices:
    """The numbers of ``indices`` that are among ``others``, in their order."""
    return tuple(index for index in indices if index in others)


def _without(indices: Sequence[int], others: Sequence[int]) -> Indices:
    taken = set(others)
    return tuple(index for index in indices if index not in taken)

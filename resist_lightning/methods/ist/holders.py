"""Plans a sync where neurons have several holders: means first, at one place for each entry, then the hand-over.

In a tensor with hidden neurons on one side, the mean of a neuron is taken by its owner, one of its holders. In one
with neurons on both sides, by the keeper of the row (:func:`~resist_lightning.methods.ist.partition.kept_rows`), whose
store then has all columns as they are::

                     merge                  hand over
    one side    holders ──► owner      owner ──► next holders       the owner's slice has the mean
    both sides  holders ──► keeper     keeper ──► next holders      the keeper's store has the mean

Pure functions, standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.plan import Frame, Indices, NeuronPlan, Piece, common
from resist_lightning.schedule.partition import Partition


def merged_pieces(cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
    """The pieces that leave or reach ``worker`` for the means, its own included, in the same order on all workers."""
    if cut.rows is not None and cut.columns is not None:
        found = _to_keepers(cut.rows, cut.columns, plan)
    else:
        owners = plan.owners[cut.layer]
        several = dict.fromkeys(block for _, _, block in owners.merge)
        own = ((owners.owner[neuron], owners.owner[neuron], neuron) for neuron in several)
        found = _grouped(cut, [*owners.merge, *own])
    return [piece for piece in found if worker in (piece.source, piece.target)]


def handed_over_pieces(cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
    """The pieces that leave or reach ``worker`` after the means, in the same order on all workers."""
    if cut.rows is not None and cut.columns is not None:
        found = _from_keepers(cut.rows, cut.columns, plan)
    else:
        owners = plan.owners[cut.layer]
        stays = []
        for neuron, owner in owners.owner.items():
            if owner in plan.after[cut.layer].holders(neuron):
                stays.append((owner, owner, neuron))
        found = _grouped(cut, [*owners.hand_over, *stays])
    return [piece for piece in found if worker in (piece.source, piece.target)]


def staying_pieces(cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
    """The piece that ``worker`` holds both before and after the sync; empty if there is none."""
    rows = columns = None
    if cut.rows is not None:
        rows = common(plan.before[cut.rows].held[worker], set(plan.after[cut.rows].held[worker]))
    if cut.columns is not None:
        columns = common(plan.before[cut.columns].held[worker], set(plan.after[cut.columns].held[worker]))
    return _not_empty([Piece(worker, worker, rows, columns)])


def whole_pieces(cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
    """The pieces of a tensor, after the means, that ``worker`` sends to make it whole elsewhere."""
    if cut.rows is not None and cut.columns is not None:
        kept = tuple(_kept(cut.rows, plan, worker))
        everything = tuple(range(plan.before[cut.columns].blocks))
        return _not_empty([Piece(worker, 0, kept, everything, "store", "full")])
    owned = tuple(neuron for neuron, owner in plan.owners[cut.layer].owner.items() if owner == worker)
    return _not_empty([_piece(cut, worker, 0, owned, enters="full")])


def _to_keepers(row_layer: int, column_layer: int, plan: NeuronPlan) -> Iterator[Piece]:
    for keeper, holder, rows, columns in _kept_and_held(plan.before, row_layer, column_layer, plan):
        yield Piece(holder, keeper, rows, columns, enters="store")


def _from_keepers(row_layer: int, column_layer: int, plan: NeuronPlan) -> Iterator[Piece]:
    for keeper, holder, rows, columns in _kept_and_held(plan.after, row_layer, column_layer, plan):
        yield Piece(keeper, holder, rows, columns, leaves="store")


def _kept_and_held(
    partitions: Sequence[Partition], row_layer: int, column_layer: int, plan: NeuronPlan
) -> Iterator[tuple[int, int, Indices, Indices]]:
    """For each keeper and each holder of some of its rows: the two workers, these rows, and the holder's columns."""
    rows, columns = partitions[row_layer], partitions[column_layer]
    for keeper in range(rows.workers):
        for holder in range(rows.workers):
            here = common(rows.held[holder], _kept(row_layer, plan, keeper))
            if here and columns.held[holder]:
                yield keeper, holder, here, columns.held[holder]


def _grouped(cut: Cut, transfers: Iterable[tuple[int, int, int]]) -> Iterator[Piece]:
    """The transfers, joined to one piece for each pair of workers."""
    moved: dict[tuple[int, int], list[int]] = defaultdict(list)
    for source, target, neuron in transfers:
        moved[source, target].append(neuron)
    for source, target in sorted(moved):
        yield _piece(cut, source, target, tuple(sorted(moved[source, target])))


def _piece(cut: Cut, source: int, target: int, neurons: Indices, enters: Frame = "slice") -> Piece:
    """A piece of a tensor with hidden neurons on one side."""
    rows = neurons if cut.rows is not None else None
    columns = neurons if cut.columns is not None else None
    return Piece(source, target, rows, columns, enters=enters)


def _kept(row_layer: int, plan: NeuronPlan, worker: int) -> range:
    # A range, as a search through thousands of numbers for each row would take seconds.
    layer = plan.before[row_layer]
    return kept_rows(layer.blocks, layer.workers, worker)


def _not_empty(found: Iterable[Piece]) -> list[Piece]:
    return [piece for piece in found if piece.rows != () and piece.columns != ()]

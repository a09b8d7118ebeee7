"""Partitions of neurons for property-based tests, and the places of single entries, by brute force."""

from __future__ import annotations

from typing import TypeAlias

from hypothesis import strategies as st

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import draw_neurons, kept_rows
from resist_lightning.methods.ist.plan import NeuronPlan, Piece
from resist_lightning.schedule.partition import Partition
from tests.helpers.partitions import of_holders

Entry: TypeAlias = tuple[int, int]
Place: TypeAlias = tuple[int, str]
"""A worker, and its ``slice`` or its ``store``."""

CUTS = {"rows": Cut(0, None), "columns": Cut(None, 1), "both": Cut(0, 1), "one layer on both sides": Cut(0, 0)}
INNER = (CUTS["both"], CUTS["one layer on both sides"])


@st.composite
def plans(draw: st.DrawFn) -> NeuronPlan:
    """Plans of two hidden layers: between partitions as drawn by IST, or between arbitrary ones."""
    workers = draw(st.integers(1, 5))
    widths = draw(st.tuples(st.integers(workers, 9), st.integers(workers, 9)))
    if draw(st.booleans()):
        seed, round = draw(st.integers(0, 2**40)), draw(st.integers(0, 10**6))
        return NeuronPlan(*(draw_neurons(widths, workers, seed, round + next) for next in (0, 1)))
    return NeuronPlan(*(tuple(draw(any_partition(width, workers)) for width in widths) for _ in range(2)))


@st.composite
def any_partition(draw: st.DrawFn, width: int, workers: int) -> Partition:
    """Any partition with one holder for each neuron; a worker may have no neuron."""
    holders = draw(st.lists(st.integers(0, workers - 1), min_size=width, max_size=width))
    return of_holders([{holder} for holder in holders], workers)


def holder(partition: Partition, neuron: int) -> int:
    """The only holder of a neuron."""
    (found,) = partition.holders(neuron)
    return found


def keeper(width: int, workers: int, row: int) -> int:
    """The only keeper of a row."""
    (found,) = [worker for worker in range(workers) if row in kept_rows(width, workers, worker)]
    return found


def place(cut: Cut, held: tuple[Partition, ...], entry: Entry) -> Place:
    """The place of an entry in a round: with the holder of its neurons, or with the keeper of its row."""
    row, column = entry
    if cut.rows is None:
        assert cut.columns is not None
        return holder(held[cut.columns], column), "slice"
    if cut.columns is None or holder(held[cut.rows], row) == holder(held[cut.columns], column):
        return holder(held[cut.rows], row), "slice"
    return keeper(held[cut.rows].blocks, held[cut.rows].workers, row), "store"


def entries(cut: Cut, held: tuple[Partition, ...]) -> list[Entry]:
    """All entries of a matrix; a side without hidden neurons has two rows or columns."""
    rows = held[cut.rows].blocks if cut.rows is not None else 2
    columns = held[cut.columns].blocks if cut.columns is not None else 2
    return [(row, column) for row in range(rows) for column in range(columns)]


def members(piece: Piece, cut: Cut) -> list[Entry]:
    """The entries of a piece."""
    assert (piece.rows is None) == (cut.rows is None)
    assert (piece.columns is None) == (cut.columns is None)
    rows = range(2) if piece.rows is None else piece.rows
    columns = range(2) if piece.columns is None else piece.columns
    return [(row, column) for row in rows for column in columns]

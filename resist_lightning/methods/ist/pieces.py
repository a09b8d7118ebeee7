"""Reads and writes pieces of divided tensors, in a worker's slice, its store or the full tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.methods.ist.plan import Frame, Indices, Piece
from resist_lightning.schedule.partition import Partition


@dataclass(frozen=True)
class Part:
    """A worker's part of a tensor that is divided among neurons.

    Args:
        cut: how it is divided.
        whole: its shape in the full model.
        worker: the worker.
        tensor: the slice, or the full tensor.
        store: the rows that this worker keeps, with all columns, on the CPU; None if it keeps none.
        kind: how its bytes are counted.
    """

    cut: Cut
    whole: tuple[int, ...]
    worker: int
    tensor: Tensor
    store: Tensor | None = None
    kind: str = "hand_over"

    def take(self, piece: Piece, held: Sequence[Partition]) -> Tensor:
        """The entries of a piece that leaves, as a flat copy on the device of the tensor."""
        view, dimension, index = self._place(piece, piece.leaves, held)
        return view.index_select(dimension, index).flatten().to(self.tensor.device)

    def put(self, piece: Piece, held: Sequence[Partition], flat: Tensor) -> None:
        """Write the entries of a piece that arrives."""
        view, dimension, index = self._place(piece, piece.enters, held)
        shape = list(view.shape)
        shape[dimension] = len(index)
        values = flat.view(shape)
        view.index_copy_(dimension, index, values.to(view.device))
        tensor = self._in(piece.enters)
        # `reshape` copies where an optimizer keeps state in another memory format.
        if view.data_ptr() != tensor.data_ptr():
            tensor.copy_(view.view(tensor.shape))

    def entries(self, piece: Piece) -> int:
        """How many numbers a piece has."""
        rows, columns, rest = _folded(self.whole, self.cut)
        if piece.rows is not None:
            rows = len(piece.rows)
        if piece.columns is not None:
            columns = len(piece.columns)
        return rows * columns * rest

    def _in(self, frame: Frame) -> Tensor:
        tensor = self.store if frame == "store" else self.tensor
        assert tensor is not None
        return tensor.detach()

    def _place(self, piece: Piece, frame: Frame, held: Sequence[Partition]) -> tuple[Tensor, int, Tensor]:
        """Where a piece is: a view of the tensor, a dimension of the view, and the places along it."""
        tensor = self._in(frame)
        rows, columns, rest = _folded(tensor.shape, self.cut)
        along_rows = self._along_rows(piece.rows, frame, held)
        along_columns = self._along_columns(piece.columns, frame, held)
        if along_rows is None:
            assert along_columns is not None
            return tensor.reshape(rows, columns, rest), 1, along_columns.to(tensor.device)
        if along_columns is None:
            return tensor.reshape(rows, columns * rest), 0, along_rows.to(tensor.device)
        # Every row with every column: the places in a matrix of rows that stand one behind the other.
        both = along_rows.unsqueeze(1) * columns + along_columns
        return tensor.reshape(rows * columns, rest), 0, both.flatten().to(tensor.device)

    def _along_rows(self, rows: Indices | None, frame: Frame, held: Sequence[Partition]) -> Tensor | None:
        if rows is None:
            return None
        if frame == "full":
            return _index(rows)
        assert self.cut.rows is not None
        layer = held[self.cut.rows]
        if frame == "store":
            return _positions(rows, kept_rows(layer.blocks, layer.workers, self.worker))
        return _positions(rows, layer.held[self.worker])

    def _along_columns(self, columns: Indices | None, frame: Frame, held: Sequence[Partition]) -> Tensor | None:
        if columns is None:
            return None
        # A store has all columns of its rows, as the full tensor has.
        if frame != "slice":
            return _index(columns)
        assert self.cut.columns is not None
        return _positions(columns, held[self.cut.columns].held[self.worker])


def _folded(shape: Sequence[int], cut: Cut) -> tuple[int, int, int]:
    """Rows, columns, and entries for each row and column."""
    if cut.columns is None:
        return shape[0], 1, prod(shape[1:])
    columns = shape[1] // cut.repeat
    return shape[0], columns, cut.repeat * prod(shape[2:])


def _positions(neurons: Indices, known: Sequence[int]) -> Tensor:
    """Where in an ascending sequence some of its members are."""
    return torch.searchsorted(_index(tuple(known)), _index(neurons))


@lru_cache(maxsize=256)  # a weight, its bias, the norm behind it and optimizer state ask for the same neurons
def _index(neurons: Indices) -> Tensor:
    return torch.tensor(neurons, dtype=torch.long)

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
        is_state: whether it is optimizer state.
    """

    cut: Cut
    whole: tuple[int, ...]
    worker: int
    tensor: Tensor
    store: Tensor | None = None
    is_state: bool = False

    def take(self, piece: Piece, held: Sequence[Partition]) -> Tensor:
        """The entries of a piece that leaves, as a flat copy on the device of the tensor."""
        view, rows, columns = self._place(piece, piece.leaves, held)
        if rows is None:
            assert columns is not None
            taken = view.index_select(1, columns)
        elif columns is None:
            taken = view.index_select(0, rows)
        else:
            taken = view[rows.unsqueeze(1), columns]
        return taken.flatten().to(self.tensor.device)

    def put(self, piece: Piece, held: Sequence[Partition], flat: Tensor) -> None:
        """Write the entries of a piece that arrives."""
        view, rows, columns = self._place(piece, piece.enters, held)
        values = flat.to(view.device)
        if rows is None:
            assert columns is not None
            view.index_copy_(1, columns, values.view(len(view), len(columns), *view.shape[2:]))
        elif columns is None:
            view.index_copy_(0, rows, values.view(len(rows), *view.shape[1:]))
        else:
            view[rows.unsqueeze(1), columns] = values.view(len(rows), len(columns), *view.shape[2:])

    def entries(self, piece: Piece) -> int:
        """How many numbers a piece has."""
        rows, columns, rest = _folded(self.whole, self.cut)
        if piece.rows is not None:
            rows = len(piece.rows)
        if piece.columns is not None:
            columns = len(piece.columns)
        return rows * columns * rest

    def tensor_of(self, frame: Frame) -> Tensor:
        """The tensor of this worker in which a piece is."""
        tensor = self.store if frame == "store" else self.tensor
        assert tensor is not None
        return tensor.detach()

    def _place(
        self, piece: Piece, frame: Frame, held: Sequence[Partition]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where a piece is: a view of the tensor whose second dimension is that of columns, and the places in both."""
        view = self.tensor_of(frame)
        if self.cut.columns is not None:
            # A view in every memory format; to fold the other dimensions would copy channels_last.
            view = view.unflatten(1, (view.shape[1] // self.cut.repeat, self.cut.repeat))
        rows = self._along_rows(piece.rows, frame, held)
        columns = self._along_columns(piece.columns, frame, held)
        on_device = [None if places is None else places.to(view.device) for places in (rows, columns)]
        return view, on_device[0], on_device[1]

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

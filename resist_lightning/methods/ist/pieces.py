"""Reads and writes pieces of divided tensors: neurons by their numbers, wherever a worker has them."""

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
    """What a worker has of a tensor that is divided among neurons.

    Args:
        cut: how.
        whole: its shape in the full model.
        tensor: the slice, or the full tensor.
        store: the rows that this worker keeps, with all columns, on the CPU; None if it keeps none.
        kind: how its bytes are counted.
    """

    cut: Cut
    whole: tuple[int, ...]
    tensor: Tensor
    store: Tensor | None = None
    kind: str = "hand_over"

    def take(self, piece: Piece, held: Sequence[Partition], worker: int) -> Tensor:
        """The entries of a piece that leaves, as a flat copy on the device of the tensor."""
        folded, dimension, index = self._place(piece, piece.leaves, held, worker)
        return folded.index_select(dimension, index).flatten().to(self.tensor.device)

    def put(self, piece: Piece, held: Sequence[Partition], worker: int, flat: Tensor) -> None:
        """Write the entries of a piece that arrives."""
        folded, dimension, index = self._place(piece, piece.enters, held, worker)
        shape = [*folded.shape[:dimension], len(index), *folded.shape[dimension + 1 :]]
        folded.index_copy_(dimension, index, flat.view(shape).to(folded.device))
        tensor = self._in(piece.enters)
        if folded.data_ptr() != tensor.data_ptr():  # a copy: optimizers may keep state in another memory format
            tensor.copy_(folded.view(tensor.shape))

    def entries(self, piece: Piece) -> int:
        """How many numbers a piece has."""
        rows, columns, rest = _folded(self.whole, self.cut)
        rows = rows if piece.rows is None else len(piece.rows)
        columns = columns if piece.columns is None else len(piece.columns)
        return rows * columns * rest

    def _in(self, frame: Frame) -> Tensor:
        tensor = self.store if frame == "store" else self.tensor
        assert tensor is not None
        return tensor.detach()

    def _place(self, piece: Piece, frame: Frame, held: Sequence[Partition], worker: int) -> tuple[Tensor, int, Tensor]:
        """A view of the tensor, and where the piece is in it: the dimension, and the places along it."""
        tensor = self._in(frame)
        rows, columns, rest = _folded(tensor.shape, self.cut)
        along_rows = along_columns = None
        if piece.rows is not None:
            assert self.cut.rows is not None
            layer = held[self.cut.rows]
            known = kept_rows(layer.blocks, layer.workers, worker) if frame == "store" else layer.held[worker]
            along_rows = _numbers(piece.rows) if frame == "full" else _positions(piece.rows, known)
        if piece.columns is not None:
            assert self.cut.columns is not None
            own = held[self.cut.columns].held[worker]
            along_columns = _positions(piece.columns, own) if frame == "slice" else _numbers(piece.columns)
        device = tensor.device
        if along_rows is not None and along_columns is not None:
            both = (along_rows.unsqueeze(1) * columns + along_columns).flatten()
            return tensor.reshape(rows * columns, rest), 0, both.to(device)
        if along_rows is not None:
            return tensor.reshape(rows, columns * rest), 0, along_rows.to(device)
        assert along_columns is not None
        return tensor.reshape(rows, columns, rest), 1, along_columns.to(device)


def _folded(shape: Sequence[int], cut: Cut) -> tuple[int, int, int]:
    """Rows, columns, and entries for each row and column."""
    if cut.columns is None:
        return shape[0], 1, prod(shape[1:])
    return shape[0], shape[1] // cut.repeat, cut.repeat * prod(shape[2:])


def _positions(neurons: Indices, known: Sequence[int]) -> Tensor:
    """Where in an ascending sequence some of its members are."""
    return torch.searchsorted(_numbers(tuple(known)), _numbers(neurons))


@lru_cache(maxsize=256)
def _numbers(neurons: Indices) -> Tensor:
    return torch.tensor(neurons, dtype=torch.long)

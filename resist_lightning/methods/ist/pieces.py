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

_AT_ONCE = 2**17  # entries copied at a time, so that they and their places stay in the cache


@dataclass(frozen=True)
class Part:
    """A worker's part of a tensor that is divided among neurons.

    Args:
        cut: the division of the tensor.
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

    def take(self, piece: Piece, held: Sequence[Partition], into: Tensor | None = None) -> Tensor:
        """The entries of a piece that leaves, as a flat copy on the device of the tensor, or in ``into`` if given."""
        view, rows, columns = self._place(piece, piece.leaves, held)
        if into is None:
            into = torch.empty(self.entries(piece), dtype=view.dtype, device=self.tensor.device)
        shape = _shape_of(view, rows, columns)
        if into.device == view.device:
            _gather(view, rows, columns, into.view(shape))
            return into
        # The store is on the CPU.
        gathered = torch.empty(shape, dtype=view.dtype, device=view.device)
        _gather(view, rows, columns, gathered)
        return into.copy_(gathered.flatten())

    def put(self, piece: Piece, held: Sequence[Partition], flat: Tensor) -> None:
        """Write the entries of a piece that arrives."""
        view, rows, columns = self._place(piece, piece.enters, held)
        values = flat.to(view.device).view(_shape_of(view, rows, columns))
        if rows is None:
            assert columns is not None
            view.index_copy_(1, columns, values)
        elif columns is None:
            view.index_copy_(0, rows, values)
        else:
            _scatter(view, rows, columns, values)

    def entries(self, piece: Piece) -> int:
        """Number of entries of a piece."""
        rows, columns, rest = _folded(self.whole, self.cut)
        if piece.rows is not None:
            rows = len(piece.rows)
        if piece.columns is not None:
            columns = len(piece.columns)
        return rows * columns * rest

    def tensor_of(self, frame: Frame) -> Tensor:
        """The tensor of this worker that contains a piece."""
        tensor = self.store if frame == "store" else self.tensor
        assert tensor is not None
        return tensor.detach()

    def _place(
        self, piece: Piece, frame: Frame, held: Sequence[Partition]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The place of a piece: a view of the tensor whose second dimension is the columns, and the indices of both."""
        view = self.tensor_of(frame)
        if self.cut.columns is not None:
            # A view in every memory format; folding the other dimensions would copy channels_last.
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


def _shape_of(view: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[int, ...]:
    shape = list(view.shape)
    if rows is not None:
        shape[0] = len(rows)
    if columns is not None:
        shape[1] = len(columns)
    return tuple(shape)


def _gather(view: Tensor, rows: Tensor | None, columns: Tensor | None, out: Tensor) -> None:
    """Copy rows x columns of a tensor into another one."""
    if rows is None:
        assert columns is not None
        torch.index_select(view, 1, columns, out=out)
    elif columns is None:
        torch.index_select(view, 0, rows, out=out)
    else:
        # Whole rows first, so few that they are still in the cache when their columns are selected.
        step = max(1, _AT_ONCE // view[0].numel())
        for some, part in zip(rows.split(step), out.split(step), strict=True):
            torch.index_select(view.index_select(0, some), 1, columns, out=part)


def _scatter(view: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Copy a tensor into rows x columns of another one."""
    # By places in memory: indexing by rows and columns takes twice as long.
    memory = view.as_strided((_extent(view),), (1,))
    within_row = columns * view.stride(1)
    for size, stride in zip(view.shape[2:], view.stride()[2:], strict=True):
        further = torch.arange(size, device=view.device) * stride
        within_row = within_row.unsqueeze(-1) + further
    # Some rows at a time: a place takes eight bytes.
    step = max(1, _AT_ONCE // within_row.numel())
    for some, part in zip(rows.split(step), values.split(step), strict=True):
        starts = some * view.stride(0)
        places = starts.unsqueeze(1) + within_row.flatten()
        memory.scatter_(0, places.flatten(), part.flatten())


def _extent(view: Tensor) -> int:
    """Number of entries of memory from a tensor's first entry to its last one."""
    steps = [(size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True)]
    return 1 + sum(steps)


def _folded(shape: Sequence[int], cut: Cut) -> tuple[int, int, int]:
    """Rows, columns, and entries for each row and column."""
    if cut.columns is None:
        return shape[0], 1, prod(shape[1:])
    columns = shape[1] // cut.repeat
    return shape[0], columns, cut.repeat * prod(shape[2:])


def _positions(neurons: Indices, known: Sequence[int]) -> Tensor:
    """The positions of ``neurons`` in the ascending sequence ``known``."""
    return torch.searchsorted(_index(tuple(known)), _index(neurons))


@lru_cache(maxsize=256)  # a weight, its bias, the norm behind it and optimizer state ask for the same neurons
def _index(neurons: Indices) -> Tensor:
    return torch.tensor(neurons, dtype=torch.long)

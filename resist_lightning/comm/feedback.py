"""What rounding has taken from means in few bits, to be added to the next ones (error feedback)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Feedback:
    """A worker's remainders: a number for each entry that is averaged, in one buffer in the order of the message."""

    def __init__(self) -> None:
        # By identity of the tensor, its piece of the buffer.
        self._pieces: dict[int, Tensor] = {}
        self._flat: Tensor | None = None

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer of some tensors, in their order; zeros where nothing was taken yet. Others are forgotten."""
        if self._flat is None or list(self._pieces) != [id(tensor) for tensor in tensors]:
            known, entries = self._pieces, sum(tensor.numel() for tensor in tensors)
            self._flat = torch.zeros(entries, device=tensors[0].device)
            self._pieces = {}
            for tensor, piece in zip(tensors, self._flat.split([t.numel() for t in tensors]), strict=True):
                self._pieces[id(tensor)] = piece
                if id(tensor) in known:
                    piece.copy_(known[id(tensor)])
        return self._flat

    def of(self, tensor: Tensor) -> Tensor | None:
        """What was taken from a tensor, flat."""
        return self._pieces.get(id(tensor))

    def load(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Resume with what :meth:`of` has told of some tensors."""
        self._flat = None
        self._pieces = {id(tensor): piece for tensor, piece in pieces}

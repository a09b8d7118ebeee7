"""Rounding errors of quantized means, added to the next ones (error feedback)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor


class Feedback:
    """A worker's rounding errors: one per averaged entry, in one buffer per message, in its order."""

    def __init__(self) -> None:
        # By identity of the tensor, its piece of a buffer; and by the tensors together, in their order, the buffer.
        self._pieces: dict[int, Tensor] = {}
        self._flats: dict[tuple[int, ...], Tensor] = {}

    def flat(self, tensors: Sequence[Tensor], kept: Collection[int] = ()) -> Tensor:
        """The rounding errors of the tensors in one buffer, in their order; zeros where there are none yet.

        Args:
            tensors: of one message.
            kept: by identity, tensors of other messages, whose errors are kept; those of all others are forgotten.
        """
        keys, known = tuple(map(id, tensors)), self._pieces
        self._pieces = {key: piece for key, piece in known.items() if key in kept}
        flat = self._flats.get(keys)
        if flat is None:
            sizes = [tensor.numel() for tensor in tensors]
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=tensors[0].device)
            pieces = dict(zip(keys, flat.split(sizes), strict=True))
            for key in pieces.keys() & known.keys():
                pieces[key].copy_(known[key])
        else:
            pieces = {key: known[key] for key in keys}
        self._pieces |= pieces
        self._flats = {each: buffer for each, buffer in self._flats.items() if set(each) <= set(kept)}
        self._flats[keys] = flat
        return flat

    def of(self, tensor: Tensor) -> Tensor | None:
        """Rounding errors of a tensor, flat; None if there are none."""
        return self._pieces.get(id(tensor))

    def load(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Restore errors that :meth:`of` returned."""
        self._flats = {}
        self._pieces = {id(tensor): piece for tensor, piece in pieces}

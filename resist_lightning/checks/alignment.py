"""Measures how the workers' changes in a round align: the cosine of a worker's change and the mean change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_WHOLE_UP_TO = 4096
_STRIDE = 64


class Alignment:
    """The alignment of a worker's change in a round with the workers' mean change. Sends nothing.

    It samples tensors that all workers hold: one entry in 64 of those with 4096 entries or more, and all of smaller
    ones. It keeps two copies of this sample.
    """

    def __init__(self) -> None:
        self._begun: Tensor | None = None
        self._ended: Tensor | None = None

    def end(self, tensors: Iterable[Tensor]) -> None:
        """Sample the tensors before they are averaged."""
        self._ended = _sample(tensors)

    def measure(self, tensors: Iterable[Tensor]) -> dict[str, float]:
        """Metrics of the round, from the same tensors after they were averaged; the next round begins with them.

        Returns:
            ``alignment``: the cosine between this worker's change and the mean of all changes, in [-1, 1]; 1 where all
            workers changed alike, about 1 / sqrt(workers) where their changes are unrelated. ``change``: the norm of
            the mean change as a share of the norm of the tensors. Empty where a round was not seen whole, or nothing
            was changed.
        """
        mean, begun, own = _sample(tensors), self._begun, self._ended
        self._begun, self._ended = mean, None
        if begun is None or own is None or not begun.shape == own.shape == mean.shape:
            return {}
        mine, all_of_us = own - begun, mean - begun
        lengths = mine.norm() * all_of_us.norm()
        if not lengths > 0:
            return {}
        change = all_of_us.norm() / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
        return {"alignment": float(mine @ all_of_us / lengths), "change": float(change)}


def _sample(tensors: Iterable[Tensor]) -> Tensor:
    """A sample of each tensor's entries, in one vector of 64-bit numbers on the host."""
    parts = [tensor.detach().flatten() for tensor in tensors]
    taken = [part[:: _STRIDE if len(part) >= _WHOLE_UP_TO else 1] for part in parts]
    return (
        torch.cat([part.to("cpu", torch.float64) for part in taken]) if taken else torch.zeros(0, dtype=torch.float64)
    )

"""Notes a member's first non-finite loss: its gradient spreads to the members that average with it."""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = 2**31 - 1


class FirstBadLoss:
    """The first local step of this round in which this process had a non-finite loss.

    Args:
        watching: whether losses are checked.
    """

    def __init__(self, *, watching: bool) -> None:
        self._watching = watching
        self._first: Tensor | None = None  # on the losses' device, so that no step waits for a GPU

    def begin_round(self) -> None:
        """Forget the losses of the round that has ended."""
        self._first = None

    def note(self, loss: Tensor, step: int) -> None:
        """Check a loss. Sends nothing, and does not wait for the GPU.

        Args:
            loss: of any shape.
            step: local steps of the round before this one.
        """
        if not self._watching:
            return
        finite = loss.detach().isfinite().all()
        first = torch.where(finite, _NEVER, step + 1)
        self._first = first if self._first is None else torch.minimum(self._first, first)

    @property
    def step(self) -> int:
        """Number of that step, counted from 1; 0 if there is none."""
        first = _NEVER if self._first is None else int(self._first)
        return 0 if first == _NEVER else first


def earliest(first: list[int]) -> list[int]:
    """The members in which NaN or infinity began; all if that is not known.

    Args:
        first: of each member, the local step of its first bad loss, counted from 1; 0 if it had none.

    Returns:
        Their places in the worker. Later members have it from them: by then their weights were not finite either.
    """
    steps = [step for step in first if step]
    least = min(steps, default=0)
    return [member for member, step in enumerate(first) if step == least]

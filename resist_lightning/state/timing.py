"""Adds up the wall time that a worker spends outside local steps: in syncs and observations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


class Seconds:
    """Adds up wall time.

    Args:
        device: waited for before the clock is read, if it is a GPU.

    Attributes:
        sync: seconds in syncs: handshake, averaging and hand-over.
        averaging: of them, averaging shared tensors, without what overlaps with the hand-over.
        hand_over: of them, merging blocks and sending them to their next holders.
        observe: seconds for assembling the full model and returning, without the evaluation itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.sync = 0.0
        self.averaging = 0.0
        self.hand_over = 0.0
        self.observe = 0.0
        self._device = device

    @contextmanager
    def timed(self, what: Literal["sync", "averaging", "hand_over", "observe"]) -> Iterator[None]:
        """Add the time inside to ``what``."""
        start = now(self._device)
        yield
        setattr(self, what, getattr(self, what) + now(self._device) - start)


def now(device: torch.device) -> float:
    """The time in seconds, after all queued work of a GPU."""
    # Without it, the time of a kernel would be counted where the next one waits for it.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

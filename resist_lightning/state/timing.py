"""Wall time, as that which a worker spends outside local steps."""

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
        averaging: of them, making shared tensors the mean of the workers', but for what happens behind a hand-over.
        hand_over: of them, merging blocks and bringing them to their next holders.
        observe: seconds for assembling the full model and going back, without the evaluation itself.
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
    """Seconds of the clock, when a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

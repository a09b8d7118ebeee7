"""Measures seconds where a device works, without making the program wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch

Mark: TypeAlias = "float | torch.cuda.Event"
"""A moment that was marked by a :class:`DeviceClock`."""


class DeviceClock:
    """Marks moments in the work of a device. A GPU's marks go into its queue, and are read when it has reached them.

    Args:
        device: the device that is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero: tuple[torch.cuda.Event, float] | None = None

    def mark(self) -> Mark:
        """Mark this moment. Waits for the device at the first call only."""
        if self._device.type != "cuda":
            return time.perf_counter()
        if self._zero is None:
            self._zero = self._event(), now(self._device)
        return self._event()

    def between(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; waits until the device has reached the second."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            milliseconds: float = start.elapsed_time(end)
            return milliseconds / 1000
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start

    def read(self, mark: Mark) -> float:
        """Seconds of a mark on the clock of :func:`time.perf_counter`, which all processes of a host share.

        On a GPU a clock that has run for an hour is exact to a fraction of a millisecond only: make a new one before.
        """
        if isinstance(mark, float):
            return mark
        assert self._zero is not None
        zero, seconds = self._zero
        return seconds + self.between(zero, mark)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Seconds:
    """Adds up the time that a worker spends outside local steps.

    Args:
        device: the device whose time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._sums = {"sync": 0.0, "observe": 0.0}
        self._unread: list[tuple[str, Mark, Mark]] = []

    @property
    def sync(self) -> float:
        """Seconds in syncs: handshake, averaging and hand-over."""
        return self._sum("sync")

    @property
    def observe(self) -> float:
        """Seconds for assembling the full model and returning, without the evaluation itself."""
        return self._sum("observe")

    def take_sync(self) -> float:
        """Seconds in syncs since the last call."""
        seconds = self._sum("sync")
        self._sums["sync"] = 0.0
        return seconds

    @contextmanager
    def timed(self, what: Literal["sync", "observe"]) -> Iterator[None]:
        """Add the time inside to ``what``."""
        self._read()  # earlier spans, which have ended long ago
        start = self._clock.mark()
        yield
        self._unread.append((what, start, self._clock.mark()))

    def _sum(self, what: str) -> float:
        self._read()
        return self._sums[what]

    def _read(self) -> None:
        for what, start, end in self._unread:
            self._sums[what] += self._clock.between(start, end)
        self._unread = []


def now(device: torch.device) -> float:
    """The time in seconds, after all queued work of a GPU, which is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""What a worker is doing, for errors that name it. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from resist_lightning.rounds import Clock

What: TypeAlias = Literal[
    "starting", "local steps", "meeting", "averaging", "hand_over", "evaluation", "saving", "finishing", "ended"
]


class Activity:
    """What a worker is doing, and where in the run; other threads may read it.

    Args:
        clock: the worker's.

    Attributes:
        what: one of :data:`What`.
        round: the round that it was in when it began with it; for a sync, the round that ends.
        step: local steps that it had taken in the round.
        since: ``time.monotonic()`` of its beginning.
        listeners: called with this object whenever the worker begins something else.
    """

    def __init__(self, clock: Clock) -> None:
        self.listeners: list[Callable[[Activity], None]] = []
        self._clock = clock
        self.begin("starting")

    def begin(self, what: What) -> None:
        """From now on the worker does ``what``."""
        self.what: What = what
        self.round, self.step, self.since = self._clock.round, self._clock.step, time.monotonic()
        for listener in self.listeners:
            listener(self)

    @contextmanager
    def during(self, what: What) -> Iterator[None]:
        """Inside, the worker does ``what``; then what it did before, unless an error ends it there."""
        before = self.what
        self.begin(what)
        yield
        self.begin(before)

    def describe(self) -> str:
        """In words, e.g. ``hand-over, round 2, local step 50``."""
        return f"{self.what.replace('_', '-')}, round {self.round}, local step {self.step}"

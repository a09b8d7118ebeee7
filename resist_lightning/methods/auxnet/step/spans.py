"""Times the parts of a step, in which a worker computes or waits for others."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch

from resist_lightning.methods.auxnet.speedup import StepSeconds
from resist_lightning.state.timing import DeviceClock, Mark

Name: TypeAlias = Literal[
    "data",
    "aux forward",
    "forward",
    "wait for output",
    "loss",
    "wait for target",
    "backward",
    "optimizer",
    "wait for truth",
    "aux backward",
]
"""The parts of a step, in this order; ``data`` is all time outside of steps. ``loss`` is the user's step with the
output, ``optimizer`` the time between the backward pass and the end of the step."""

KEPT_STEPS = 15  # enough for a median

NAMES: tuple[Name, ...] = get_args(Name)

Span: TypeAlias = tuple[str, float, float]


class Spans:
    """Records the spans of a worker's steps, without gaps.

    ``time.perf_counter`` is the same clock for all processes of a Linux host.

    Args:
        device: device of the steps. A GPU is not waited for: a step is read when the next one has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clock = DeviceClock(device)
        self._recent: deque[list[Span]] = deque(maxlen=KEPT_STEPS)
        self._steps = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._unread: list[list[tuple[Name, Mark, Mark]]] = []  # steps that have ended
        self._current: list[tuple[Name, Mark, Mark]] = []
        self._name: Name | None = None
        self._since: Mark = 0.0

    @property
    def recent(self) -> list[list[Span]]:
        """The last steps that ended, each with its spans (name, begin, end in seconds)."""
        self._read()
        return list(self._recent)

    def begin(self, name: Name) -> None:
        """End the span that is open, and begin another one."""
        moment = self._clock.mark()
        if self._name is not None:
            self._current.append((self._name, self._since, moment))
        self._name, self._since = name, moment

    @contextmanager
    def inside(self, name: Name) -> Iterator[None]:
        """Interrupt the open span by another one."""
        around = self._name
        self.begin(name)
        yield
        if around is not None:
            self.begin(around)

    def rename(self, name: Name) -> None:
        """Record the open span, if there is one, under another name."""
        if self._name is not None:
            self._name = name

    def end_step(self, *, counts: bool = True) -> None:
        """End the step; until the next one, time counts as ``data``.

        Args:
            counts: whether the step is recorded; a serial one is not.
        """
        self.begin("data")
        step, self._current = self._current, []
        if not counts:
            return
        self._read()  # earlier steps, which a GPU has computed by now or will soon
        self._unread.append(step)

    def pause(self) -> None:
        """Drop the open step: an evaluation, which is no part of the training, interrupts it."""
        self._name = None
        self._current = []

    def take(self) -> list[float]:
        """Mean seconds of each of :data:`NAMES` in a step since the last call; zeros if there was none."""
        self._read()
        steps = max(self._steps, 1)
        mean = [self._seconds[name] / steps for name in NAMES]
        self._seconds = defaultdict(float)
        self._steps = 0
        self._clock = DeviceClock(self._device)
        return mean

    def _read(self) -> None:
        """Read the marks of steps that have ended."""
        for step in self._unread:
            read: list[Span] = [(name, self._clock.read(begin), self._clock.read(end)) for name, begin, end in step]
            self._recent.append(read)
            self._steps += 1
            for name, begin, end in read:
                self._seconds[name] += end - begin
        self._unread = []


def typical_step(workers: Sequence[Sequence[Sequence[Span]]]) -> list[list[Span]]:
    """The recent step that took the median time: for each worker its spans, from 0.

    Args:
        workers: for each worker, its :attr:`Spans.recent`; the last steps are the same steps.
    """
    kept = min(map(len, workers), default=0)
    if kept == 0:
        return []
    # A worker may have recorded more steps; the last ones are the same on all.
    recent = [list(worker)[-kept:] for worker in workers]
    steps = list(zip(*recent, strict=True))
    steps.sort(key=lambda step: _end(step) - _start(step))
    median = steps[kept // 2]
    start = _start(median)
    moved = []
    for spans in median:
        moved.append([(name, begin - start, end - start) for name, begin, end in spans])
    return moved


def _start(step: Sequence[Sequence[Span]]) -> float:
    """The time when the first worker began with a step."""
    return min(spans[0][1] for spans in step)


def _end(step: Sequence[Sequence[Span]]) -> float:
    return max(spans[-1][2] for spans in step)


_WAITS: tuple[Name, ...] = ("wait for output", "wait for target", "wait for truth")
_DONE_BY_ALL: tuple[Name, ...] = ("data", "loss", "optimizer")
"""Work of every worker that one process would do once: the user's step, hooks, the optimizer's loop over parameters.
Of the updates themselves a stage does only a part, which is not told apart: a small disadvantage for the stages."""


def step_seconds(workers: Sequence[Mapping[str, float]]) -> StepSeconds | None:
    """The six numbers of section 2.6 from the spans of all workers; None where a worker has none.

    The waits are those of the worker that waits least: the others wait for it, which is no cost of the exchange.

    Args:
        workers: for each worker, the mean seconds of each of :data:`NAMES` in a step.
    """
    # In a round of serial steps only, nothing was recorded.
    if not workers or not all(row["forward"] for row in workers):
        return None
    waits = [sum(row[name] for name in _WAITS) for row in workers]
    return StepSeconds(
        data=_done_by_all(workers),
        forward=sum(row["forward"] for row in workers),
        backward=sum(row["backward"] for row in workers),
        penalty=min(waits),
        aux_forward=max(row["aux forward"] for row in workers),
        aux_backward=max(row["aux backward"] for row in workers),
    )


def measured_speedup(workers: Sequence[Mapping[str, float]]) -> float:
    """Seconds of a step in one process that trains all stages, divided by those of a step here."""
    # One process would compute all stages, one after the other.
    stages = sum(row["forward"] + row["backward"] for row in workers)
    alone = _done_by_all(workers) + stages
    return alone / max(sum(row.values()) for row in workers)


def _done_by_all(workers: Sequence[Mapping[str, float]]) -> float:
    """Seconds of the worker that is quickest with this work: those of others may contain a wait."""
    return min(sum(row[name] for name in _DONE_BY_ALL) for row in workers)

"""When a worker computes in a step, and when it waits."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch

from resist_lightning.methods.auxnet.speedup import StepSeconds

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
"""What happens between two steps (``data``: all that is outside), and in one, in this order. ``loss`` is what the
user's step does with the output, ``optimizer`` what comes between the backward pass and the end of the step."""

KEPT_STEPS = 15

NAMES: tuple[Name, ...] = get_args(Name)

Span: TypeAlias = tuple[str, float, float]


class Spans:
    """The spans of a worker's steps, one behind the other.

    ``time.perf_counter`` is the same clock for all processes of a Linux host.

    Args:
        device: waited for before the clock is read, if it is a GPU.

    Attributes:
        recent: the last steps that ended, each with its spans (name, begin, end in seconds).
        steps: how many ended since :meth:`take`.
    """

    def __init__(self, device: torch.device) -> None:
        self.recent: deque[list[Span]] = deque(maxlen=KEPT_STEPS)
        self.steps = 0
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._current: list[Span] = []
        self._name: Name | None = None
        self._since = 0.0

    def begin(self, name: Name) -> None:
        """End the span that is open, and begin another one."""
        now = self._now()
        if self._name is not None:
            self._current.append((self._name, self._since, now))
        self._name, self._since = name, now

    @contextmanager
    def inside(self, name: Name) -> Iterator[None]:
        """A span inside another one, which goes on behind it."""
        around = self._name
        self.begin(name)
        yield
        if around is not None:
            self.begin(around)

    def call_it(self, name: Name) -> None:
        """The span that is open was this all the time."""
        self._name = name if self._name is not None else None

    def end_step(self, *, counts: bool = True) -> None:
        """The step has ended; until the next one, it is ``data``.

        Args:
            counts: whether it is one of the steps that are told of; one in which stages wait for each other is not.
        """
        self.begin("data")
        step, self._current = self._current, []
        if not counts:
            return
        self.recent.append(step)
        self.steps += 1
        for name, begin, end in step:
            self._seconds[name] += end - begin

    def pause(self) -> None:
        """What comes now is no part of the training."""
        self._name, self._current = None, []

    def take(self) -> list[float]:
        """Mean seconds of each of :data:`NAMES` in a step since the last call; zeros if there was none."""
        mean = [self._seconds[name] / self.steps if self.steps else 0.0 for name in NAMES]
        self._seconds, self.steps = defaultdict(float), 0
        return mean

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def typical_step(workers: Sequence[Sequence[Sequence[Span]]]) -> list[list[Span]]:
    """Of the recent steps of all workers, the one that took the median time; for each worker its spans from 0.

    Args:
        workers: for each, its :attr:`Spans.recent`; the last steps are the same steps.
    """
    kept = min(map(len, workers), default=0)
    if kept == 0:
        return []
    steps = [[list(worker)[-kept:][number] for worker in workers] for number in range(kept)]
    ends = [(min(spans[0][1] for spans in step), max(spans[-1][2] for spans in step)) for step in steps]
    chosen = sorted(range(kept), key=lambda number: ends[number][1] - ends[number][0])[kept // 2]
    start = ends[chosen][0]
    return [[(name, begin - start, end - start) for name, begin, end in spans] for spans in steps[chosen]]


_WAITS: tuple[Name, ...] = ("wait for output", "wait for target", "wait for truth")
_DONE_BY_ALL: tuple[Name, ...] = ("data", "loss", "optimizer")
"""What every worker does, and one process would do once: the user's step, hooks, what the optimizer does for each of
its parameters. Of the optimizer's own work a stage has a part only, which is not told apart: a small injustice to the
stages."""


def step_seconds(workers: Sequence[Mapping[str, float]]) -> StepSeconds | None:
    """The six numbers of section 2.6 from what each worker measured; None where a worker measured nothing.

    Of the waits, those of the worker that waits least: the others wait for it, which is no cost of the exchange.

    Args:
        workers: for each, the mean seconds of each of :data:`NAMES` in a step.
    """
    if not workers or not all(row["forward"] for row in workers):
        return None
    return StepSeconds(
        data=_done_by_all(workers),
        forward=sum(row["forward"] for row in workers),
        backward=sum(row["backward"] for row in workers),
        penalty=min(sum(row[name] for name in _WAITS) for row in workers),
        aux_forward=max(row["aux forward"] for row in workers),
        aux_backward=max(row["aux backward"] for row in workers),
    )


def measured_speedup(workers: Sequence[Mapping[str, float]]) -> float:
    """Seconds of a step of one process that trains all stages, over those of a step here."""
    stages = sum(row["forward"] + row["backward"] for row in workers)
    return (_done_by_all(workers) + stages) / max(sum(row.values()) for row in workers)


def _done_by_all(workers: Sequence[Mapping[str, float]]) -> float:
    """Of the worker that is quickest with it: the others' may be a wait."""
    return min(sum(row[name] for name in _DONE_BY_ALL) for row in workers)

"""Cases on several cores: independent processes of one torch thread each, none of which outlives the run."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

import torch

from experiments.accuracy.cases import Case
from experiments.accuracy.data import Prepared, prepare
from experiments.accuracy.settings import Settings
from experiments.accuracy.training import measure

_prepared: dict[str, Prepared] = {}


def measured(cases: Sequence[Case], settings: Settings) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Measure cases, ``settings.jobs`` at a time; gives each as soon as it is there."""
    if min(settings.jobs, len(cases)) > 1:
        prepare(settings)  # decodes a folder once, and refuses a bad one, before any process starts
    return each(cases, partial(_measure, settings=settings), settings.jobs)


def each(
    cases: Sequence[Any], work: Callable[[Any], dict[str, Any]], jobs: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Do some work for every case, ``jobs`` at a time; gives each result as soon as it is there.

    Stopped in the middle (an exception, Ctrl-C, SIGTERM), the processes are ended before the error goes on.
    """
    if min(jobs, len(cases)) < 2:
        _begin()
        yield from ((case, work(case)) for case in cases)
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(jobs, len(cases)), mp_context=context, initializer=_begin_in_child)
    known = set(multiprocessing.active_children())
    finished = False
    try:
        futures = {executor.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    finally:
        if not finished:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - known:
                child.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def _begin() -> None:
    torch.set_num_threads(1)


def _begin_in_child() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    _begin()


def _measure(case: Case, settings: Settings) -> dict[str, Any]:
    key = repr(settings)
    if key not in _prepared:
        _prepared.clear()
        _prepared[key] = prepare(settings)
    return measure(case, settings, _prepared[key])

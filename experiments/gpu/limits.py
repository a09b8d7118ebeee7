"""Runs cases in processes of their own, several at a time, and kills those that take too long with all they started."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from experiments.gpu.cases import Allowance
from experiments.harness.record import hiding

POLL_SECONDS = 0.02
Work = Callable[[Any], dict[str, Any]]


class Skipped(Exception):
    """A case cannot be measured here; with the reason."""


@dataclass
class Running:
    """A case that is being measured."""

    case: Any
    process: ForkProcess
    folder: tempfile.TemporaryDirectory[str]
    began: float
    seconds: float  # that it may take

    @property
    def over(self) -> bool:
        return time.monotonic() - self.began > self.seconds


def measured(
    cases: Sequence[Any], work: Work, allowed: Callable[[], Allowance], together: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every case with its row, as soon as it is there.

    A row has ``outcome`` (done, skipped, failed, killed), ``reason`` (None if done), ``seconds``, and results.

    Each case is a fork of this process, which imports everything once and must never use a GPU itself. Left early, by
    an error or Ctrl-C, everything that runs is killed.
    """
    waiting = list(cases)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < together:
                case, allowance = waiting.pop(0), allowed()
                if allowance.refusal is not None:
                    yield case, {"outcome": "skipped", "reason": allowance.refusal, "seconds": 0.0}
                else:
                    running.append(_begin(case, work, allowance.seconds))
            for one in [one for one in running if one.over or one.process.exitcode is not None]:
                running.remove(one)
                yield one.case, _end(one)
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            _end(one)


def _begin(case: Any, work: Work, seconds: float) -> Running:
    sys.stdout.flush()  # or the fork would print it again
    folder = tempfile.TemporaryDirectory(prefix="gpu_")
    process = multiprocessing.get_context("fork").Process(target=_live, args=(case, work, folder.name))
    process.start()
    return Running(case, process, folder, time.monotonic(), seconds)


def _end(one: Running) -> dict[str, Any]:
    """Kill the remaining processes of a case, and read its results."""
    in_time = one.process.exitcode is not None
    assert one.process.pid is not None
    with suppress(ProcessLookupError):  # nobody is left of its session
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.kill()  # if it was not yet the leader of a session
    one.process.join()
    seconds = round(time.monotonic() - one.began, 2)
    with one.folder as name:
        row = _row(Path(name), one, in_time)
    return {**row, "seconds": seconds}


def _row(folder: Path, one: Running, in_time: bool) -> dict[str, Any]:
    result = folder / "result.json"
    if result.exists():  # renamed there, so it is whole
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    hide = hiding(folder)
    output = folder / "output"
    said = hide(output.read_text(errors="replace") if output.exists() else "", end=True)
    if not in_time:
        return {"outcome": "killed", "reason": f"not done after {one.seconds:.0f} s; it said last: {said}"}
    return {"outcome": "failed", "reason": f"ended with exit code {one.process.exitcode}: {said}"}


def _live(case: Any, work: Work, name: str) -> None:
    """Run a case in its own process."""
    os.setsid()  # so that all it starts can be killed with it
    folder = Path(name)
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tempfile.tempdir = name  # files of a killed process go with the folder
    try:
        row = {"outcome": "done", "reason": None, **work(case)}
    except Skipped as skipped:
        row = {"outcome": "skipped", "reason": str(skipped)}
    except Exception:  # noqa: BLE001 - whatever it is, it is a result
        row = {"outcome": "failed", "reason": hiding(folder)(traceback.format_exc(), end=True)}
    draft = folder / "draft.json"
    draft.write_text(json.dumps(row))
    draft.rename(folder / "result.json")
    sys.stdout.flush()
    os._exit(0)  # without the exit handlers that the parent has registered

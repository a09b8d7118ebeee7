"""The messages in the store: heartbeats of workers, and reports of monitors. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias, TypeVar

from resist_lightning.errors import process_name

End: TypeAlias = Literal["", "done", "failed", "gave up"]

NOBODY = -1
"""Stands for a worker where there is none to name."""


@dataclass(frozen=True)
class Process:
    """A process of a worker: its rank, host and PID; they do not change.

    Args:
        worker: its rank, which is its number where each worker is one process.
        host: its host's name.
        home: a name of its host and PID namespace; workers with the same one can see each other's processes.
        pid: its process number.
        members: processes of each worker.
    """

    worker: int
    host: str
    home: str
    pid: int
    members: int = 1

    @property
    def short_name(self) -> str:
        """The worker's name, without host and PID."""
        return process_name(self.worker, self.members)

    @property
    def name(self) -> str:
        """The worker's name, with host and PID."""
        return f"{self.short_name} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Heartbeat:
    """A worker's report about itself, posted in the store.

    Args:
        beat: grows by one with each heartbeat.
        what: one of :data:`resist_lightning.schedule.progress.ActivityName`.
        doing: the same in words.
        seconds: duration of that so far.
        round: the round in which it began.
        step: local steps taken in the round by then.
        end: ``""`` while it runs; its outcome otherwise.
        text: its error where it failed; else its verdict, if it has one.
        lost: the worker that the verdict is about, if known; else -1.
        read: the number of the last report of worker 0 that it has read.
    """

    beat: int = 0
    what: str = "starting"
    doing: str = "starting"
    seconds: float = 0.0
    round: int = 0
    step: int = 0
    end: End = ""
    text: str = ""
    lost: int = NOBODY
    read: int = 0


@dataclass(frozen=True)
class Report:
    """A monitor's report about all workers; its size does not grow with their number.

    Args:
        beat: grows by one with each report.
        end: as in the monitor's heartbeat.
        verdict: the verdict about a lost worker, in words; or empty.
        lost: the worker that the verdict is about, if known; else -1.
        silent: whether the verdict is about a worker that is silent, and so may be frozen.
        quiet: the worker that has been silent for longest, where that is suspicious; else -1.
        quiet_text: the same in words.
        late: the worker furthest behind in work that it does without the others; -1 if none does such work.
        late_text: that work, in words.
        doing: the last activities of some workers, in words.
    """

    beat: int = 0
    end: End = ""
    verdict: str = ""
    lost: int = NOBODY
    silent: bool = False
    quiet: int = NOBODY
    quiet_text: str = ""
    late: int = NOBODY
    late_text: str = ""
    doing: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict that a worker is lost.

    Args:
        text: the worker, and how it was lost, in words.
        worker: its rank, if known; else -1.
        silent: whether only its silence shows it, so that it may be frozen.
        frozen: its process number, if it may be frozen on this host, and so cannot end by itself; else 0.
    """

    text: str
    worker: int = NOBODY
    silent: bool = False
    frozen: int = 0


_NAMED = 8  # workers whose activities a report tells
_APART: tuple[str, ...] = ("starting", "local steps", "evaluation", "saving")  # activities without the others


def make_report(
    beat: int,
    own: Process,
    verdict: Verdict | None,
    quiet: Verdict | None,
    heartbeats: Mapping[int, Heartbeat],
    processes: Sequence[Process],
    gone: Collection[int],
) -> Report:
    """Make a monitor's report.

    Args:
        beat: its number.
        own: the monitor.
        verdict: the monitor's, if it has one.
        quiet: about the worker that has been silent for suspiciously long, if there is one.
        heartbeats: the last one of each worker, the monitor's own among them.
        processes: all workers, by rank.
        gone: workers whose process is gone.
    """
    mine = heartbeats[own.worker]
    if mine.end == "failed":
        verdict = Verdict(f"{own.name} failed with {mine.text}{last_of(own, mine)}", own.worker)
    verdict, quiet = verdict or Verdict(""), quiet or Verdict("")
    late = _latest(heartbeats, gone)
    doing = []
    for worker in sorted(heartbeats)[:_NAMED]:
        each = heartbeats[worker]
        doing.append(f"{processes[worker].name}: {'has ended' if each.end else each.doing}")
    if len(processes) > len(doing):
        doing.append(f"and {len(processes) - len(doing)} more")
    return Report(
        beat=beat,
        end=mine.end,
        verdict=verdict.text,
        lost=verdict.worker,
        silent=verdict.silent,
        quiet=quiet.worker,
        quiet_text=quiet.text,
        late=late,
        late_text=f"{heartbeats[late].doing}, since {heartbeats[late].seconds:.0f} s" if late >= 0 else "",
        doing="; ".join(doing),
    )


def last_of(process: Process, heartbeat: Heartbeat | None) -> str:
    """A worker's last activity, as a sentence to append; empty if it is not known."""
    if heartbeat is None:
        return ""
    return f" {process.short_name.capitalize()} was last doing: {heartbeat.doing}."


def _latest(heartbeats: Mapping[int, Heartbeat], gone: Collection[int]) -> int:
    """The worker furthest behind in work that it does without the others; among equals, the one longest at it."""
    apart = []
    for worker, each in heartbeats.items():
        if each.what in _APART and not each.end and worker not in gone:
            apart.append((each.round, each.step, -each.seconds, worker))
    return min(apart)[3] if apart else -1


Message = TypeVar("Message", Process, Heartbeat, Report)

_ACCEPTED: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
_TYPES: dict[type, dict[str, tuple[type, ...]]] = {
    kind: {field.name: _ACCEPTED.get(str(field.type), (str,)) for field in fields(kind)}
    for kind in (Process, Heartbeat, Report)
}


def to_line(message: Process | Heartbeat | Report) -> str:
    """A message as a line of text, to be posted."""
    return json.dumps(asdict(message))


def parse(kind: type[Message], line: str) -> Message | None:
    """Parse a line into a message; None if it is none.

    Unknown fields, as of a newer version, are ignored.
    """
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    types = _TYPES[kind]
    known = {name: value for name, value in given.items() if name in types}
    # By the exact type: True would pass as an int.
    if any(type(value) not in types[name] for name, value in known.items()):
        return None
    try:
        return kind(**known)
    except TypeError:  # something is missing
        return None

"""Decides from heartbeats which worker is lost. Standard library only."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

from resist_lightning.errors import first_line, process_name

BEAT_SECONDS = 1.0
"""How often a worker posts a heartbeat."""

NAP_SECONDS = 5.0
"""A watchdog that has not run for so long was stopped itself, and may not count that time against the others."""

_BROKEN = ("gloo/", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "nccl")
# NCCL's errors of this worker alone, which no other one has caused.
_OWN = ("out of memory", "duplicate gpu", "invalid usage", "invalid argument", "unhandled cuda error")
_TIMED_OUT = ("timed out", "timeout")
_APART: tuple[str, ...] = ("starting", "local steps", "evaluation", "saving")  # what a worker does without the others

_PARENT = -1  # stands among workers for the process without which this one must not run
_LONGEST_LINE = 1_000_000  # some hundred bytes, and as many for each worker where one names those that are alive

End: TypeAlias = Literal["", "done", "failed", "gave up"]


@dataclass(frozen=True)
class Heartbeat:
    """What a worker posts about itself.

    Args:
        worker: its rank, which is its number where each worker is one process.
        host: its host's name.
        home: a name of the host's processes; workers with the same one can see each other's.
        pid: its process.
        beat: grows by one with each heartbeat.
        what: one of :data:`resist_lightning.schedule.progress.ActivityName`.
        doing: the same in words.
        seconds: for how long it has been doing that.
        round: the round in which it began.
        step: local steps taken in the round by then.
        end: ``""`` while it runs; how it ended otherwise.
        text: its error, or the verdict with which it gave up.
        members: processes of each worker.
    """

    worker: int
    host: str
    home: str
    pid: int
    beat: int = 0
    what: str = "starting"
    doing: str = "starting"
    seconds: float = 0.0
    round: int = 0
    step: int = 0
    end: End = ""
    text: str = ""
    members: int = 1

    def write(self) -> str:
        """As text, to be posted."""
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        """The worker, where it runs."""
        return f"{process_name(self.worker, self.members)} (host {self.host}, pid {self.pid})"


def read_heartbeat(line: bytes, worker: int) -> Heartbeat | None:
    """Parse the heartbeat of ``worker`` from its line; None if it is invalid, as anybody may write to the store.

    Fields that are unknown, as of a newer version, are passed over.
    """
    if len(line) > _LONGEST_LINE:
        return None
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):  # ValueErrors are those of JSON and of UTF-8 too
        return None
    if not isinstance(given, dict) or given.get("worker") != worker:
        return None
    known = {name: value for name, value in given.items() if name in _TYPES}
    # By the exact type: True would pass as an int.
    if any(type(value) not in _TYPES[name] for name, value in known.items()):
        return None
    try:
        return Heartbeat(**known)
    except TypeError:  # something is missing
        return None


_ACCEPTED: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float)}
_TYPES = {field.name: _ACCEPTED.get(str(field.type), (str,)) for field in fields(Heartbeat)}


@dataclass(frozen=True)
class Verdict:
    """That a worker is lost.

    Args:
        text: which one, and how, in words.
        worker: its number, if known; else -1.
        frozen: its process, if that may be frozen on this host, and so cannot end by itself; else 0.
    """

    text: str
    worker: int = -1
    frozen: int = 0


class FailureDetector:
    """One worker's view of which others are alive. All times are those of one monotonic clock, in seconds.

    Args:
        mine: this worker's first heartbeat.
        workers: how many there are.
        silence: after how long without a heartbeat a worker counts as lost.
        store: who serves the store, in words.
        now: the time.

    Attributes:
        heartbeats: the last one of each other worker.
    """

    def __init__(self, mine: Heartbeat, workers: int, silence: float, store: str, now: float) -> None:
        self.heartbeats: dict[int, Heartbeat] = {}
        self._mine = mine
        self._silence = silence
        self._store = store
        self._others = [worker for worker in range(workers) if worker != mine.worker]
        # Times: of each other worker's last heartbeat, of the last reading, and when this process last ran.
        self._last = dict.fromkeys(self._others, now)
        self._read = self._awake = now
        self._gone_since: dict[int, float] = {}

    def hear(self, heartbeats: Sequence[Heartbeat], now: float) -> None:
        """Record heartbeats that were read from the store."""
        for heartbeat in heartbeats:
            worker = heartbeat.worker
            # One that was read before does not show that its worker still runs.
            if worker in self._last and self.heartbeats.get(worker) != heartbeat:
                self.heartbeats[worker] = heartbeat
                self._last[worker] = now
        self._read = max(self._read, now)

    def wake(self, now: float) -> None:
        """Call it every beat. Time in which this process was stopped is not counted against the others."""
        nap = now - self._awake
        if nap > NAP_SECONDS:
            self._last = {worker: last + nap for worker, last in self._last.items()}
            self._read += nap
        self._awake = now

    def neighbours(self) -> list[Heartbeat]:
        """The running workers whose processes can be seen from here."""
        home = self._mine.home
        return [each for each in self.heartbeats.values() if not each.end and each.home == home]

    def judge(self, now: float, gone: Mapping[int, str], orphaned: str = "") -> Verdict | None:
        """Name the lost worker, if any; certain knowledge comes first.

        Args:
            now: the time.
            gone: workers whose process is gone, and how it ended. Their last heartbeat may still be on its way, so it
                takes another look to count.
            orphaned: that the process has ended without which this one must not run, in words; or empty.
        """
        heartbeats = self._sorted()
        # A worker's own error comes first: processes that are gone and workers that gave up are often its consequence.
        for each in heartbeats:
            if each.end == "failed":
                return Verdict(f"{each.name} failed with {each.text}{self._last_of(each.worker)}", each.worker)
        missing = dict(gone)
        if orphaned:
            missing[_PARENT] = orphaned
        for worker in self._confirmed(now, missing):
            if worker == _PARENT:
                return Verdict(orphaned)
            lost = self.heartbeats[worker]
            if not lost.end:
                return Verdict(f"{lost.name} {gone[worker]}.{self._last_of(worker)}", worker)
        for each in heartbeats:
            if each.end == "gave up":
                return Verdict(each.text)
        # Before silences: while the store does not answer, every worker seems silent.
        unread = now - self._read
        if unread > self._silence:
            host = f" Most likely lost: {self.heartbeats[0].name}." if 0 in self.heartbeats else ""
            return Verdict(f"{self._store} has not answered for {unread:.0f} s.{host}{self._last_of(0)}")
        return self._silent(self._silence)

    def suspect(self, error: str, timeout: float, beats: float) -> Verdict:
        """Name the most likely worker when a connection broke and nobody is known to be lost.

        Args:
            error: the text of what was raised.
            timeout: after how long a worker that waits gives up, in seconds.
            beats: how many missed beats make a worker suspect.
        """
        silent = self._silent(beats * BEAT_SECONDS)
        if silent is not None:
            return silent
        apart = [heartbeat for heartbeat in self.running() if heartbeat.what in _APART]
        if apart and any(word in error.lower() for word in _TIMED_OUT):
            # The one furthest behind; among equals, the one that has been at it for longest.
            late = min(apart, key=lambda heartbeat: (heartbeat.round, heartbeat.step, -heartbeat.seconds))
            return Verdict(
                f"{late.name} is alive, but has not come to the handshake for {timeout:.0f} s: it is still in "
                f"{late.doing}, since {late.seconds:.0f} s.",
                late.worker,
            )
        seen = [f"{each.name}: {'has ended' if each.end else each.doing}" for each in self._sorted()]
        return Verdict(
            f"a connection between the workers broke or timed out ({first_line(error)}), and no worker is known to be "
            f"lost. The others were last doing: {'; '.join(seen) or 'nothing that is known'}. If one worker called "
            "what all must call (self.all_gather, self.log(..., sync_dist=True), trainer.save_checkpoint), call it on "
            "all of them."
        )

    def heard(self, beats: Mapping[int, int], lost: Verdict | None) -> bool:
        """Whether all that run, but a lost one, have read the store since ``beats``: each posts, then reads."""
        for each in self.running():
            if lost is not None and each.worker == lost.worker:
                continue
            # Two beats: the first may have read the store before this worker has posted.
            if each.beat < beats.get(each.worker, each.beat) + 2:
                return False
        return True

    def running(self) -> list[Heartbeat]:
        """The last heartbeats of workers that have not posted their end, and whose process is not gone."""
        return [each for each in self._sorted() if not each.end and each.worker not in self._gone_since]

    def _sorted(self) -> list[Heartbeat]:
        return [self.heartbeats[worker] for worker in sorted(self.heartbeats)]

    def _confirmed(self, now: float, gone: Mapping[int, str]) -> list[int]:
        """Those that have been gone long enough: workers first, then the process without which this one may not run."""
        self._gone_since = {worker: self._gone_since.get(worker, now) for worker in gone}
        confirmed = []
        for worker, since in self._gone_since.items():
            # Longer for the parent: it often ends because of a lost worker, which is the better answer.
            beats = 3.0 if worker == _PARENT else 1.5
            if now - since >= beats * BEAT_SECONDS:
                confirmed.append(worker)
        return sorted(confirmed, reverse=True)

    def _silent(self, limit: float) -> Verdict | None:
        """The longest silence above the limit, as it was when the store was last read."""
        silence, lost = limit, None
        for worker in self._others:
            ended = worker in self.heartbeats and self.heartbeats[worker].end
            # Up to the last reading: a store that does not answer makes nobody silent.
            if not ended and self._read - self._last[worker] > silence:
                silence, lost = self._read - self._last[worker], worker
        if lost is None:
            return None
        if lost not in self.heartbeats:
            name = process_name(lost, self._mine.members)
            return Verdict(f"{name} has not been heard of since the start, {silence:.0f} s ago.", lost)
        last = self.heartbeats[lost]
        return Verdict(
            f"{last.name} has not been heard of for {silence:.0f} s: it is frozen, or its host cannot be reached."
            f"{self._last_of(lost)}",
            lost,
            frozen=last.pid if last.home == self._mine.home else 0,
        )

    def _last_of(self, worker: int) -> str:
        last = self.heartbeats.get(worker)
        name = process_name(worker, self._mine.members).capitalize()
        return f" {name} was last doing: {last.doing}." if last is not None else ""


def is_broken_connection(text: str) -> bool:
    """Whether the text of a RuntimeError is torch.distributed's, of a connection that broke or timed out."""
    lower = text.lower()
    return any(word in lower for word in _BROKEN) and not any(word in lower for word in _OWN)


def name_of_exit(code: int) -> str:
    """How a process ended, in words, e.g. ``was ended by signal 9 (SIGKILL)``."""
    if code >= 0:
        return f"ended with exit code {code} without a word"
    try:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was ended by signal {-code}"

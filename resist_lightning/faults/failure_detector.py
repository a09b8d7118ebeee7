"""Decides from heartbeats which worker is lost. Standard library only."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

BEAT_SECONDS = 1.0
"""How often a worker posts a heartbeat."""

NAP_SECONDS = 5.0
"""A watchdog that has not run for so long was stopped itself, and may not count that time against the others."""

_BROKEN = ("gloo/", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "nccl")
_TIMED_OUT = ("timed out", "timeout")
_APART: tuple[str, ...] = ("starting", "local steps", "evaluation", "saving")  # what a worker does without the others

_LONGEST_LINE = 1_000_000  # some hundred bytes, and as many for each worker where one names those that are alive

End: TypeAlias = Literal["", "done", "failed", "gave up"]


@dataclass(frozen=True)
class Heartbeat:
    """What a worker posts about itself.

    Args:
        worker: who gives it.
        host: its host's name.
        home: a name of the host's processes; workers with the same one can see each other's.
        pid: its process.
        beat: grows by one with each sign.
        what: one of :data:`resist_lightning.schedule.progress.What`.
        doing: what it is doing, in words.
        seconds: for how long.
        round: the round that it was in when it began with it.
        step: its local steps in the round.
        end: ``""`` while it runs; how it ended otherwise.
        text: its error, or whom it gave up and why.
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

    def write(self) -> str:
        """As text, to be posted."""
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        """The worker, where it runs."""
        return f"worker {self.worker} (host {self.host}, pid {self.pid})"


def read_heartbeat(line: bytes, worker: int) -> Heartbeat | None:
    """Parse the heartbeat of ``worker`` from its line; None if it is invalid, as anybody may write to the store.

    Fields that are unknown, as of a newer version, are passed over.
    """
    try:
        given = json.loads(line) if len(line) <= _LONGEST_LINE else None
    except (ValueError, RecursionError):  # ValueErrors are those of JSON and of UTF-8 too
        return None
    if not isinstance(given, dict) or given.get("worker") != worker:
        return None
    known = {field.name: given[field.name] for field in fields(Heartbeat) if field.name in given}
    if any(type(value) not in _TYPES[name] for name, value in known.items()):
        return None
    try:
        return Heartbeat(**known)
    except TypeError:  # something is missing
        return None


_TYPES: dict[str, tuple[type, ...]] = {
    field.name: {"int": (int,), "float": (int, float)}.get(str(field.type), (str,)) for field in fields(Heartbeat)
}


@dataclass(frozen=True)
class Verdict:
    """That a worker is lost.

    Args:
        text: which one, and how, in words.
        worker: its number, if known; else -1.
        frozen: its process, if it may still exist on this host, though it can do nothing any more; else 0.
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
    """

    def __init__(self, mine: Heartbeat, workers: int, silence: float, store: str, now: float) -> None:
        self.signs: dict[int, Heartbeat] = {}
        self._mine = mine
        self._silence = silence
        self._store = store
        self._others = [worker for worker in range(workers) if worker != mine.worker]
        self._last = dict.fromkeys(self._others, now)
        self._read = self._awake = now
        self._gone_since: dict[int, float] = {}

    def hear(self, signs: Sequence[Heartbeat], now: float) -> None:
        """Record heartbeats that were read from the store."""
        for sign in signs:
            if sign.worker in self._last and (sign.worker not in self.signs or self.signs[sign.worker] != sign):
                self.signs[sign.worker], self._last[sign.worker] = sign, now
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
        return [sign for sign in self.signs.values() if not sign.end and sign.home == self._mine.home]

    def judge(self, now: float, gone: Mapping[int, str], orphaned: str = "") -> Verdict | None:
        """Name the lost worker, if any; certain knowledge comes first.

        Args:
            now: the time.
            gone: workers whose process is gone, and how it ended. Their last words may still be on their way, so it
                takes another look to count.
            orphaned: that the process has ended without which this one must not run, in words; or empty.
        """
        signs = [self.signs[worker] for worker in sorted(self.signs)]
        # A worker's own error comes first: processes that are gone and workers that gave up are often its consequence.
        for sign in signs:
            if sign.end == "failed":
                return Verdict(f"{sign.name} failed with {sign.text}{self._last_of(sign.worker)}", sign.worker)
        for worker in self._confirmed(now, {**gone, **({-1: orphaned} if orphaned else {})}):
            if worker < 0:
                return Verdict(orphaned)
            if not self.signs[worker].end:
                return Verdict(f"{self.signs[worker].name} {gone[worker]}.{self._last_of(worker)}", worker)
        for sign in signs:
            if sign.end == "gave up":
                return Verdict(sign.text)
        # Before silences: while the store does not answer, every worker seems silent.
        unread = now - self._read
        if unread > self._silence:
            host = f" Most likely lost: {self.signs[0].name}." if 0 in self.signs else ""
            return Verdict(f"{self._store} has not answered for {unread:.0f} s.{host}{self._last_of(0)}")
        return self._silent(self._silence)

    def suspect(self, error: str, timeout: float, beats: float) -> Verdict:
        """Whom to name when a connection broke and nobody is known to be lost.

        Args:
            error: the text of what was raised.
            timeout: after how long a worker that waits gives up, in seconds.
            beats: how many missed beats make a worker suspect.
        """
        silent = self._silent(beats * BEAT_SECONDS)
        if silent is not None:
            return silent
        apart = sorted((s for s in self.running() if s.what in _APART), key=lambda s: (s.round, s.step, -s.seconds))
        if apart and any(word in error.lower() for word in _TIMED_OUT):
            late = apart[0]
            return Verdict(
                f"{late.name} is alive, but has not come to the handshake for {timeout:.0f} s: it is still in "
                f"{late.doing}, since {late.seconds:.0f} s.",
                late.worker,
            )
        seen = [f"{sign.name}: {'has ended' if sign.end else sign.doing}" for _, sign in sorted(self.signs.items())]
        return Verdict(
            "a connection between the workers broke or timed out, and no worker is known to be lost. The others were "
            f"last doing: {'; '.join(seen) or 'nothing that is known'}. If one worker called what all must call "
            "(self.all_gather, self.log(..., sync_dist=True), trainer.save_checkpoint), call it on all of them."
        )

    def heard(self, beats: Mapping[int, int], lost: Verdict | None) -> bool:
        """Whether all that run, but a lost one, have read the store since ``beats``: each posts, then reads."""
        running = [sign for sign in self.running() if lost is None or sign.worker != lost.worker]
        return all(sign.beat >= beats.get(sign.worker, sign.beat) + 2 for sign in running)

    def running(self) -> list[Heartbeat]:
        """The last heartbeats of those that have not said that they end, and whose process is not gone."""
        return [sign for worker, sign in sorted(self.signs.items()) if not sign.end and worker not in self._gone_since]

    def _confirmed(self, now: float, gone: Mapping[int, str]) -> list[int]:
        """Those that have been gone long enough: a worker first, then (-1) the process without which nobody may run."""
        self._gone_since = {worker: self._gone_since.get(worker, now) for worker in gone}
        beats = {worker: 3.0 if worker < 0 else 1.5 for worker in gone}
        return sorted(
            (w for w, since in self._gone_since.items() if now - since >= beats[w] * BEAT_SECONDS), reverse=True
        )

    def _silent(self, limit: float) -> Verdict | None:
        """The longest silence above the limit, as it was when the store was last read."""
        silences = [
            (self._read - self._last[worker], worker)
            for worker in self._others
            if worker not in self.signs or not self.signs[worker].end
        ]
        silence, worker = max(silences, key=lambda pair: (pair[0], -pair[1]), default=(0.0, 0))
        if silence <= limit:
            return None
        if worker not in self.signs:
            return Verdict(f"worker {worker} has not been heard of since the start, {silence:.0f} s ago.", worker)
        sign = self.signs[worker]
        return Verdict(
            f"{sign.name} has not been heard of for {silence:.0f} s: it is frozen, or its host cannot be reached."
            f"{self._last_of(worker)}",
            worker,
            frozen=sign.pid if sign.home == self._mine.home else 0,
        )

    def _last_of(self, worker: int) -> str:
        sign = self.signs.get(worker)
        return f" Worker {worker} was last doing: {sign.doing}." if sign is not None else ""


def is_broken_connection(text: str) -> bool:
    """Whether the text of a RuntimeError is torch.distributed's, of a connection that broke or timed out."""
    return any(word in text.lower() for word in _BROKEN)


def name_of_exit(code: int) -> str:
    """How a process ended, in words, e.g. ``was ended by signal 9 (SIGKILL)``."""
    if code >= 0:
        return f"ended with exit code {code} without a word"
    try:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was ended by signal {-code}"

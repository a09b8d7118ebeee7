"""Decides from heartbeats and reports which worker is lost. Standard library only.

Two workers are monitors: they read the heartbeats of all, and each publishes a report that every worker reads. So the
others need not read S lines each, and a monitor that is lost is named by the other one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from resist_lightning.errors import first_line
from resist_lightning.faults.messages import NOBODY, Heartbeat, Process, Report, Verdict, last_of, make_report
from resist_lightning.faults.monitors import choose_monitors, choose_neighbours
from resist_lightning.faults.reasons import timed_out

BEAT_SECONDS = 1.0
"""Usual time between two heartbeats of a worker."""

NAP_SECONDS = 5.0
"""A watchdog that has not run for this long was itself stopped, and does not count that time against the others."""

SUSPICIOUS_BEATS = 3.0
"""Number of missed beats that make a worker suspect when a connection breaks."""


M = TypeVar("M", Heartbeat, Report)

_PARENT = -2  # stands, among workers, for the parent process, without which this one must not run


class FailureDetector:
    """A worker's view of the others: which of them are alive. All times are of one monotonic clock, in seconds.

    A monitor judges by heartbeats, any other worker by reports and by the processes of its host.

    Args:
        worker: this worker's rank.
        processes: all workers, by rank.
        silence: time without a heartbeat after which a worker counts as lost.
        store: the server of the store, in words.
        now: the time.

    Attributes:
        monitoring: whether this worker is a monitor.
        neighbours: the processes that this worker watches.
        heartbeats: the last heartbeat read of each worker, and the last one posted by this worker.
        reports: the last report of each monitor.
    """

    def __init__(self, worker: int, processes: Sequence[Process], silence: float, store: str, now: float) -> None:
        self.heartbeats: dict[int, Heartbeat] = {}
        self.reports: dict[int, Report] = {}
        self.neighbours = choose_neighbours(processes, worker)
        monitors = choose_monitors(processes)
        self.monitoring = worker in monitors
        self._own = processes[worker]
        self._processes = processes
        self._silence = silence
        self._store = store
        # Workers whose silence counts: all others for a monitor, the monitors for any other worker.
        watched = range(len(processes)) if self.monitoring else monitors
        self._watched = [other for other in watched if other != worker]
        self._last = dict.fromkeys(self._watched, now)  # when each watched worker was last heard of
        self._read = now  # when the store was last read
        self._met = now  # when all workers last came to a sync
        self._awake = now  # when this process last ran
        self._gone_since: dict[int, float] = {}

    # Input.

    def wanted(self) -> list[int]:
        """The workers whose heartbeats are to be read: all others for a monitor, else neighbours that are gone.

        The last heartbeat of one that is gone tells whether it had ended before.
        """
        return self._watched if self.monitoring else [worker for worker in self._gone_since if worker != _PARENT]

    def hear(
        self,
        heartbeats: Mapping[int, Heartbeat],
        now: float,
        reports: Mapping[int, Report] | None = None,
        tampered: Collection[int] = (),
    ) -> None:
        """Record messages read from the store.

        Args:
            heartbeats: by worker.
            now: the time.
            reports: by monitor.
            tampered: workers whose line a stranger has overwritten; their silence does not count, as they may post.
        """
        reports = reports or {}
        overwritten = set(tampered)
        overwritten.update(self._take_new(self.heartbeats, heartbeats, now, counts=self.monitoring))
        overwritten.update(self._take_new(self.reports, reports, now, counts=not self.monitoring))
        for worker in overwritten & self._last.keys():
            self._last[worker] = now
        self._read = max(self._read, now)

    def note_own(self, heartbeat: Heartbeat, now: float) -> None:
        """Record this worker's heartbeat. A new round in it shows that all workers have come to a sync."""
        before = self.heartbeats.get(self._own.worker)
        self.heartbeats[self._own.worker] = heartbeat
        if before is not None and heartbeat.round > before.round:
            self._met = now
            self._last = {worker: max(last, now) for worker, last in self._last.items()}

    def wake(self, now: float) -> None:
        """Called every beat. Time in which this process was stopped is not counted against the others."""
        nap = now - self._awake
        if nap > NAP_SECONDS:
            self._last = {worker: last + nap for worker, last in self._last.items()}
            self._read += nap
        self._awake = now

    # Output.

    def judge(self, now: float, gone: Mapping[int, str], orphaned: str = "") -> Verdict | None:
        """Name the lost worker, if any; certain knowledge comes first.

        Args:
            now: the time.
            gone: neighbours whose process is gone, and how it ended. Their last heartbeat may still be in transit, so
                they count only at a later look.
            orphaned: the end of the process without which this one must not run, in words; or empty.
        """
        certain = self._certain(now, gone, orphaned)
        if certain is not None:
            return certain
        # The monitors' reports next: they have read the heartbeats of all.
        for report in self._reports():
            if report.verdict:
                frozen = self._pid_here(report.lost) if report.silent else 0
                return Verdict(report.verdict, report.lost, report.silent, frozen)
        # Then verdicts of other workers, as about a process of their own host.
        for _, each in self._others():
            if each.text:
                return Verdict(each.text, each.lost)
        # Before silences: while the store does not answer, every worker seems silent.
        unread = now - max(self._read, self._met)
        if unread > self._silence:
            first = self._processes[0]
            host = f" Most likely lost: {first.name}." if first != self._own else ""
            return Verdict(f"{self._store} has not answered for {unread:.0f} s.{host}{self._last_of(0)}")
        return self._silent(self._silence)

    def report(self, beat: int, verdict: Verdict | None) -> Report:
        """This monitor's report.

        Args:
            beat: the report's number.
            verdict: that of this worker, if it has one.
        """
        quiet = self._silent(SUSPICIOUS_BEATS * BEAT_SECONDS)
        return make_report(beat, self._own, verdict, quiet, self.heartbeats, self._processes, self._gone_since.keys())

    def suspect(self, error: str, timeout: float) -> Verdict:
        """Name the worker most likely lost when a connection broke and nobody is known to be lost.

        Args:
            error: the text of the error.
            timeout: of a waiting worker, in seconds.
        """
        silent = self._silent(SUSPICIOUS_BEATS * BEAT_SECONDS)
        if silent is not None and self.monitoring:
            return silent
        own = self._own.worker
        reports = self._reports()
        for each in reports:
            if each.quiet not in (NOBODY, own):
                return Verdict(each.quiet_text, each.quiet, silent=True, frozen=self._pid_here(each.quiet))
        if silent is not None:
            return silent
        for each in reports:
            if each.late not in (NOBODY, own) and timed_out(error):
                return Verdict(
                    f"{self._processes[each.late].name} is alive, but has not reached the handshake for {timeout:.0f} "
                    f"s: it is still in {each.late_text}.",
                    each.late,
                )
        doing = reports[0].doing if reports else "unknown"
        return Verdict(
            f"a connection between the workers broke or timed out ({first_line(error)}), and no worker is known to be "
            f"lost. The workers were last doing: {doing}. If only one worker called a collective (self.all_gather, "
            "self.log(..., sync_dist=True), trainer.save_checkpoint), call it on all workers."
        )

    def have_read(self, beat: int, lost: Verdict | None) -> bool:
        """Whether all running workers, the lost one aside, have read report ``beat``; only worker 0 may ask."""
        for worker in self._watched:
            gone = worker in self._gone_since or self._has_ended(worker)
            expected = not gone and (lost is None or worker != lost.worker)
            if expected and self.heartbeats.get(worker, Heartbeat()).read < beat:
                return False
        return True

    def _take_new(self, known: dict[int, M], found: Mapping[int, M], now: float, *, counts: bool) -> list[int]:
        """Keep newer messages; returns the workers whose message is older than one already read, and so overwritten.

        Args:
            known: the last message of each worker.
            found: the messages read.
            now: the time.
            counts: whether a message shows that its worker runs.
        """
        older = []
        for worker, message in found.items():
            before = known.get(worker)
            if before is None or message.beat > before.beat:
                known[worker] = message
                if counts and worker in self._last:
                    self._last[worker] = now
            elif message.beat < before.beat:
                older.append(worker)
        return older

    def _certain(self, now: float, gone: Mapping[int, str], orphaned: str) -> Verdict | None:
        # A worker's own error comes first: processes that are gone and workers that gave up are often its consequence.
        for worker, each in self._others():
            if each.end == "failed":
                text = f"{self._processes[worker].name} failed with {each.text}{self._last_of(worker)}"
                return Verdict(text, worker)
        missing = dict(gone)
        if orphaned:
            missing[_PARENT] = orphaned
        for worker in self._confirmed(now, missing):
            if worker == _PARENT:
                return Verdict(orphaned)
            if not self._has_ended(worker):
                return Verdict(f"{self._processes[worker].name} {gone[worker]}.{self._last_of(worker)}", worker)
        return None

    def _others(self) -> list[tuple[int, Heartbeat]]:
        return [(worker, self.heartbeats[worker]) for worker in sorted(self.heartbeats) if worker != self._own.worker]

    def _reports(self) -> list[Report]:
        """The last report of each monitor; a monitor's own first, as it is the newest."""
        return [self.reports[monitor] for monitor in sorted(self.reports, key=lambda each: each != self._own.worker)]

    def _confirmed(self, now: float, gone: Mapping[int, str]) -> list[int]:
        """Processes gone for long enough: workers first, then the process without which this one must not run."""
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
        silences = {}
        for worker in self._watched:
            if not self._has_ended(worker):
                # Up to the last reading: a store that does not answer makes nobody silent.
                silences[worker] = self._read - self._last[worker]
        longest = max(silences, key=lambda worker: silences[worker], default=NOBODY)
        if longest == NOBODY or silences[longest] <= limit:
            return None
        # One lost monitor is named by the other one; the workers name one only where both are silent.
        if not self.monitoring and min(silences.values()) <= limit:
            return None
        silence = silences[longest]
        lost = self._processes[longest]
        if longest not in self.heartbeats and longest not in self.reports:
            text = f"{lost.name} has sent no heartbeat since the start, {silence:.0f} s ago."
        else:
            text = (
                f"{lost.name} has sent no heartbeat for {silence:.0f} s: it is frozen, or its host cannot be "
                f"reached.{self._last_of(longest)}"
            )
        return Verdict(text, longest, silent=True, frozen=self._pid_here(longest))

    def _has_ended(self, worker: int) -> bool:
        return any(worker in known and known[worker].end != "" for known in (self.heartbeats, self.reports))

    def _pid_here(self, worker: int) -> int:
        """The number of the worker's process, if it is one of this host; else 0."""
        lost = self._processes[worker] if worker >= 0 else None
        return lost.pid if lost is not None and lost.home == self._own.home else 0

    def _last_of(self, worker: int) -> str:
        return last_of(self._processes[worker], self.heartbeats.get(worker))

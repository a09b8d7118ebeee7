"""The watchdog: background threads that detect a lost worker and make this one end too.

They communicate through the group's store, over a connection of their own, and take part in no collective. There are
two, because a call to a store whose host is frozen does not return: one posts heartbeats and reads, the other judges.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

from resist_lightning.comm.group import interrupt_group
from resist_lightning.comm.waiting import check_while_waiting, forget_check
from resist_lightning.errors import WorkerLost
from resist_lightning.faults.failure_detector import BEAT_SECONDS, FailureDetector
from resist_lightning.faults.heartbeats import CONNECT_SECONDS, Heartbeats, Lines
from resist_lightning.faults.host import is_alive
from resist_lightning.faults.messages import End, Heartbeat, Verdict
from resist_lightning.faults.reasons import is_broken_connection
from resist_lightning.faults.surroundings import Surroundings
from resist_lightning.schedule.progress import Activity

EXIT_CODE = 75
"""Exit code of a process that could not end by itself: EX_TEMPFAIL, try again."""

PATIENCE_SECONDS = 5.0
"""Time that a worker with a broken connection searches for the lost one, and that worker 0 waits to be heard."""

# Minimum time between two heartbeats: neither short rounds nor many workers together must overload the store.
_REST_SECONDS = 0.05
_HEARTBEATS_PER_SECOND = 2000  # of all workers together, at one store


class Watchdog:
    """Posts heartbeats and judges those of the other workers, until :meth:`stop`.

    Args:
        heartbeats: the connection through which they are posted and read, after :meth:`Heartbeats.introduce`.
        surroundings: the program around it.
        silence: seconds without a heartbeat after which a worker counts as lost; also those that this worker has to end
            by itself when another one is lost.
        timeout: of a waiting worker, in seconds; for messages.

    Attributes:
        verdict: on the lost worker; None as long as none is known.
    """

    def __init__(self, heartbeats: Heartbeats, surroundings: Surroundings, *, silence: float, timeout: float) -> None:
        self.verdict: Verdict | None = None
        self._heartbeats = heartbeats
        self._around = surroundings
        self._silence = silence
        self._timeout = timeout
        self._process = heartbeats.own
        self._own = Heartbeat()
        self._detector = FailureDetector(
            self._process.worker, heartbeats.processes, silence, surroundings.store, now=time.monotonic()
        )
        self._rest = min(BEAT_SECONDS, max(_REST_SECONDS, heartbeats.workers / _HEARTBEATS_PER_SECOND))
        self._last_reading = 0.0
        self._reports = 0  # published by this worker
        self._lock = threading.Lock()  # of the detector, which all threads use
        self._stopped = threading.Event()
        self._wake = threading.Event()  # post a heartbeat now
        self._arrived = threading.Event()  # the main thread has an error, and will end by itself
        self._reached = True  # whether the store was, at the last try
        self._ending: tuple[End, str] = ("", "")
        self._posted: End = ""
        self._said = False  # whether a warning of strangers' lines was printed
        self._urgent = False  # read with every heartbeat
        self._beating = threading.Thread(target=self._beat, name="resist_lightning heartbeats", daemon=True)
        self._judging = threading.Thread(target=self._look_around, name="resist_lightning watchdog", daemon=True)

    def start(self) -> None:
        """Start the threads. They end before the interpreter does, which aborts if one is in a call to C++ then."""
        atexit.register(self.stop)
        check_while_waiting(self.check)
        self._beating.start()
        self._judging.start()

    def wake(self) -> None:
        """Post a heartbeat now."""
        self._wake.set()

    def stop(self) -> None:
        """Stop watching. A call to a store that does not answer is cut off."""
        self._stopped.set()
        forget_check(self.check)
        # Both threads may be waiting on one of these; without them they would end only after their timeouts.
        self._arrived.set()
        self._wake.set()
        # A forked process has a copy of the connection, which it must not cut, and no threads.
        if os.getpid() == self._process.pid and not self._ended(BEAT_SECONDS):
            self._heartbeats.cut()
            self._ended(CONNECT_SECONDS + BEAT_SECONDS)
        atexit.unregister(self.stop)

    def _ended(self, patience: float) -> bool:
        """Whether the threads end within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        threads = (self._beating, self._judging)
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def check(self) -> None:
        """Raise if a worker is known to be lost. Cheap; call it where this worker can end.

        Raises:
            WorkerLost: if a worker is known to be lost.
        """
        if self.verdict is not None:
            raise self.error()

    def error(self) -> WorkerLost:
        """The error that names the lost worker."""
        assert self.verdict is not None
        strangers = ""
        if self._heartbeats.tampered_lines:
            strangers = f" {_strangers(self._heartbeats.tampered_lines, self._around.store)}"
        return WorkerLost(f"{self.verdict.text}{strangers} {self._around.how_to_resume()}")

    def explain(self, error: BaseException) -> WorkerLost | None:
        """Convert an error of this worker into the one that names the lost worker; None if the error is its own.

        A connection error names no worker, so this searches for the lost one for some seconds. From now on the process
        is left to end by itself.
        """
        self._arrived.set()
        if isinstance(error, WorkerLost):
            return error
        if not isinstance(error, RuntimeError) or not is_broken_connection(str(error)):
            return None
        self._urgent = True
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.verdict is None and time.monotonic() < deadline:
            self._judge()
            self._wake.set()
            time.sleep(BEAT_SECONDS / 4)
        if self.verdict is None:
            with self._lock:
                self.verdict = self._detector.suspect(str(error), self._timeout)
        return self.error()

    def post_end(self, end: End, text: str = "") -> None:
        """Post this worker's outcome, and stop. Worker 0, which may serve the store, waits until a failure is heard."""
        self._urgent = True
        self._ending = (end, text)
        must_be_heard = end != "done" and self._process.worker == 0
        with_the_end = 0  # the number of the report that has it
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = BEAT_SECONDS / 200  # mostly it is posted at once
        while self._reached and self._beating.is_alive() and time.monotonic() < deadline:
            self._wake.set()
            if self._posted == end:
                if not must_be_heard:
                    break
                with_the_end = with_the_end or self._reports
                with self._lock:
                    if self._detector.have_read(with_the_end, self.verdict):
                        break
            time.sleep(pause)
            pause = min(2 * pause, BEAT_SECONDS / 20)
        self.stop()

    def _beat(self) -> None:
        """Post heartbeats, and read the others'. May hang in a call until :meth:`stop`."""
        while not self._stopped.is_set():
            try:
                self._exchange()
            except Exception:  # noqa: BLE001 - the store cannot be reached; of anything else too, no thread may die here
                self._reached = False
                if not self._stopped.wait(2 * BEAT_SECONDS):
                    with suppress(Exception):
                        self._heartbeats.connect_again()
                continue
            self._reached = True
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()
            self._stopped.wait(self._rest)

    def _exchange(self) -> None:
        """Post a heartbeat; also read the others' and publish a report, unless that was done just now."""
        own = self._next()
        with self._lock:
            self._detector.note_own(own, time.monotonic())
            wanted = self._detector.wanted()
        self._heartbeats.post(own)
        if self._urgent or time.monotonic() - self._last_reading >= BEAT_SECONDS / 2:
            self._last_reading = time.monotonic()
            if own.end != "done":  # then worker 0, which serves the store, may be gone before it answers
                self._hear(self._heartbeats.read(wanted))
            if self._detector.monitoring:
                with self._lock:
                    report = self._detector.report(self._reports + 1, self.verdict)
                self._heartbeats.publish(report)
                self._reports += 1
            self._posted = own.end
        elif not self._detector.monitoring:
            self._posted = own.end

    def _hear(self, lines: Lines) -> None:
        if lines.tampered and not self._said and self._detector.monitoring:
            self._said = True
            sys.stderr.write(f"{_strangers(self._heartbeats.tampered_lines, self._around.store)}\n")
        with self._lock:
            self._detector.hear(lines.heartbeats, time.monotonic(), lines.reports, lines.tampered)

    def _next(self) -> Heartbeat:
        end, text = self._ending
        read = self._detector.reports.get(0)
        verdict = self.verdict
        if verdict is not None and end != "failed":
            text = verdict.text  # at once: the monitors tell it to those that cannot find it out
        self._own = replace(
            self._own,
            beat=self._own.beat + 1,
            end=end,
            text=text,
            lost=verdict.worker if verdict is not None else -1,
            read=read.beat if read is not None else 0,
        )
        activity = self._around.activity()
        if activity is not None:
            if self._on_change not in activity.listeners:
                activity.listeners.append(self._on_change)
            self._own = replace(
                self._own,
                what=activity.what,
                doing=activity.describe(),
                seconds=time.monotonic() - activity.since,
                round=activity.round,
                step=activity.step,
            )
        return self._own

    def _on_change(self, activity: Activity) -> None:
        """Called by the main thread, also in every local step: post a heartbeat at once if the activity changed."""
        if activity.what != self._own.what:
            self._wake.set()

    def _look_around(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with self._lock:
                self._detector.wake(time.monotonic())
            if self.verdict is None:
                with suppress(Exception):  # the next look may succeed; without this thread nobody looks
                    self._judge()
            if self.verdict is not None:
                self._end_this_worker()
                return

    def _judge(self) -> None:
        """Set the verdict, if there is one; the first stays."""
        with self._lock:
            gone = {}
            for each in self._detector.neighbours:
                how = self._how_gone(each.pid)
                if how:
                    gone[each.worker] = how
            verdict = self._detector.judge(time.monotonic(), gone, self._around.orphaned())
            self.verdict = self.verdict or verdict
        if self.verdict is not None:
            self._wake.set()  # the others should know

    def _how_gone(self, pid: int) -> str:
        """The end of a process of this host, in words; empty if it runs."""
        return self._around.how_ended(pid) or ("" if is_alive(pid) else "ended without reporting an error")

    def _end_this_worker(self) -> None:
        """Wake a main thread that waits for the lost worker; if it does not end by itself, end the process."""
        # In a thread of its own: NCCL may take its time, and this one must be able to end the process.
        threading.Thread(target=interrupt_group, name="resist_lightning abort", daemon=True).start()
        if self._arrived.wait(self._silence):
            return
        with suppress(Exception):
            sys.stderr.write(
                f"{self.error()!r}\n{self._process.name} is terminated: it did not end by itself within "
                f"{self._silence:.0f} s. It was last doing: {self._own.doing}.\n"
            )
            sys.stderr.flush()
        with suppress(Exception):
            self._around.before_exit()
        os._exit(EXIT_CODE)


def _strangers(lines: int, store: str) -> str:
    return (
        f"{lines} heartbeat line(s) in {store} were forged or removed; forged ones were ignored. Whoever reaches its "
        "port can write there, so keep others out (SECURITY.md)."
    )

"""Watches for workers that end while the group forms, which the others otherwise notice only at the group's timeout.

There is no group yet, so workers introduce themselves in the store, unsigned: until the group is made, everything
depends on the store, and a stranger who writes there can keep the workers from starting, but not end a training.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

from resist_lightning.comm.group import StoreConnection, connect_to_store, interrupt_joining, next_group
from resist_lightning.comm.sockets import open_sockets
from resist_lightning.faults.failure_detector import BEAT_SECONDS
from resist_lightning.faults.host import is_alive
from resist_lightning.faults.messages import Process, parse, to_line
from resist_lightning.faults.monitors import NEIGHBOURS

SLOW_SECONDS = 30.0
"""Time after which worker 0 names the workers that it waits for."""

_CALL_SECONDS = 2.0  # timeout of each call to the store
_GRACE_SECONDS = 5.0  # in which the main thread should raise, after its connections were cut
_NAMED = 16  # missing workers that are named
_EXIT_CODE = 75
_FOLDER = "resist_lightning/start"  # in the store


class StartWatch:
    """Inside, this worker watches for others that end before the group is made, and then raises soon.

    Args:
        own: this process.
        workers: number of processes.
        address: of the store.
        port: of the store.
        orphaned: the end of the process without which this one must not run, in words; or empty.

    Attributes:
        lost: the lost worker, in words; or empty.
    """

    def __init__(self, own: Process, workers: int, address: str, port: int, orphaned: Callable[[], str]) -> None:
        self.lost = ""
        self._own = own
        self._workers = workers
        self._where = (address, port)
        self._orphaned = orphaned
        self._began = time.monotonic()
        self._store: StoreConnection | None = None
        self._named = False  # whether the missing workers were named
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_around, name="resist_lightning start", daemon=True)

    def __enter__(self) -> StartWatch:
        self._before = open_sockets()
        group, _, number = next_group(*self._where, self._workers).rpartition("/")
        # The group before it: a process that was in it and has ended since will never come.
        self._prefix, self._earlier = (f"{_FOLDER}/{group}/{each}" for each in (int(number), int(number) - 1))
        if self._workers > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and self._thread.is_alive():
            # A broken connection may come from another worker's end: find out whose.
            deadline = time.monotonic() + 2 * BEAT_SECONDS
            while not self.lost and time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 10)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(2 * _CALL_SECONDS)

    def missing(self) -> str:
        """The ranks that have not come to the store, as a sentence; empty if all have, or the store does not answer."""
        absent = []
        with suppress(Exception):
            assert self._store is not None
            absent = [rank for rank in range(self._workers) if not self._store.check([self._place(rank)])]
        if not absent:
            return ""
        named = ", ".join(str(rank) for rank in absent[:_NAMED])
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        return (
            f"Of {self._workers} ranks these have not reached the store at {self._where[0]}:{self._where[1]}: "
            f"{named}{more}. They were not started, have ended, or cannot connect to it."
        )

    def _look_around(self) -> None:
        while not self._ended.is_set():
            found = self._orphaned()
            with suppress(Exception):  # the store is not there yet, or not any more
                self._introduce()
                found = found or self._find_lost()
                self._tell_who_is_missing()
            if found:
                self._end_this_worker(found)
                return
            self._ended.wait(BEAT_SECONDS)

    def _introduce(self) -> None:
        if self._store is None:
            store = connect_to_store(*self._where, timedelta(seconds=_CALL_SECONDS))
            store.set(self._place(self._own.worker), to_line(self._own))
            self._store = store

    def _find_lost(self) -> str:
        """The lost worker, in words: a process of this host among the next ranks, or one found by another worker."""
        assert self._store is not None
        told = f"{self._prefix}/lost"
        if self._store.check([told]):
            return self._store.get(told).decode(errors="replace")[:500]
        for step in range(1, min(NEIGHBOURS, self._workers - 1) + 1):
            rank = (self._own.worker + step) % self._workers
            other = self._introduced(self._prefix, rank)
            how = " while the workers were starting; its own output says why."
            if other is None:
                other = self._introduced(self._earlier, rank)
                how = (
                    ", and cannot take part in what this process begins now. Call fit, validate, test, predict, "
                    "save_checkpoint and the strategy's messages on all workers, not on worker 0 alone."
                )
            if other is not None and other.home == self._own.home and not is_alive(other.pid):
                found = f"{other.name} has ended{how}"
                self._store.set(told, found)
                return found
        return ""

    def _introduced(self, prefix: str, rank: int) -> Process | None:
        """The process that has introduced itself with this rank; None if none has."""
        assert self._store is not None
        place = f"{prefix}/{rank}"
        if not self._store.check([place]):
            return None
        return parse(Process, self._store.get(place).decode(errors="replace"))

    def _tell_who_is_missing(self) -> None:
        if self._own.worker == 0 and not self._named and time.monotonic() - self._began > SLOW_SECONDS:
            self._named = True
            sys.stderr.write(f"Waiting for {SLOW_SECONDS:.0f} s. {self.missing()}\n")

    def _end_this_worker(self, found: str) -> None:
        """Wake the main thread; if it does not end by itself, end the process."""
        self.lost = found
        if self._own.worker == 0:
            self._ended.wait(2 * BEAT_SECONDS)  # the store ends with this process: the others should read it first
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            # Repeatedly: a client that cannot connect retries.
            interrupt_joining(self._before)
            if self._ended.wait(BEAT_SECONDS / 2):
                return
        with suppress(Exception):
            sys.stderr.write(f"{found} {self._own.name} is terminated because it does not end by itself.\n")
            sys.stderr.flush()
        os._exit(_EXIT_CODE)

    def _place(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

"""Posts and reads heartbeats through the group's store: one line per worker."""

from __future__ import annotations

from datetime import timedelta
from itertools import count

from resist_lightning.comm.group import clone_store
from resist_lightning.comm.sockets import cut_connections, recording

CONNECT_SECONDS = 5.0
"""Timeout of a new connection, and of reading a line that somebody has removed."""

_instances = count()


class Heartbeats:
    """A connection of its own to the group's store; any thread may use it, one at a time. No call is a collective.

    Calls raise RuntimeError if the store is gone, and do not return while its host is frozen.

    Args:
        worker: this process's rank.
        workers: how many processes there are.
        members: processes of each worker, for messages.
        name: the same for all workers. By default the number of instances that this process has made, which is the
            same if all workers make them equally often.
    """

    def __init__(self, worker: int, workers: int, name: str | None = None, *, members: int = 1) -> None:
        self.members = members
        self.worker = worker
        self.workers = workers
        # The store outlives a fit, and the next one must not read its heartbeats.
        name = name or str(next(_instances))
        self._keys = [f"resist_lightning/heartbeats/{name}/{number}" for number in range(workers)]
        self._sockets: set[str] = set()
        with recording(self._sockets):
            self._store = clone_store()
        self._store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
        self._present: list[int] = []

    def post(self, line: str) -> None:
        """Post this worker's line, in the place of its last one."""
        self._store.set(self._keys[self.worker], line)

    def read(self) -> dict[int, bytes]:
        """The lines of all workers that have posted one, as they are: anybody who reaches the store can write there."""
        if len(self._present) < self.workers:
            # Reading a key that is not there would wait for it.
            self._present = [worker for worker, key in enumerate(self._keys) if self._store.check([key])]
        lines = self._store.multi_get([self._keys[worker] for worker in self._present])
        return dict(zip(self._present, lines, strict=True))

    def connect_again(self) -> None:
        """After an error: make a new connection, and look again which lines there are."""
        self._present = []
        with recording(self._sockets):
            self._store = self._store.clone()

    def cut(self) -> None:
        """End a call of another thread that does not return; this object cannot be used any more."""
        cut_connections(self._sockets)

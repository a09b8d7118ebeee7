"""A board on which every worker posts a line and reads those of the others, in the group's store."""

from __future__ import annotations

from itertools import count

from resist_lightning.collective import StoreClient, group_store

_numbers = count()


class Board:
    """A connection of its own to the group's store; any thread may use it, one at a time. No call is a collective.

    Calls raise RuntimeError if the store is gone, and do not return while its host is frozen.

    Args:
        worker: this worker's number.
        workers: how many there are.
        name: of the board; the same for all workers. By default the number of boards that this process has had, which
            is the same if all workers make them equally often.
    """

    def __init__(self, worker: int, workers: int, name: str | None = None) -> None:
        self.worker = worker
        self.workers = workers
        name = name or str(next(_numbers))
        self._keys = [f"resist_lightning/board/{name}/{number}" for number in range(workers)]
        self._origin: StoreClient = group_store()
        self._store: StoreClient = self._origin.clone()
        self._known: list[str] = []

    def post(self, line: str) -> None:
        """Put up this worker's line, in the place of its last one."""
        self._store.set(self._keys[self.worker], line)

    def read(self) -> list[str]:
        """The lines of all workers that have posted one."""
        if len(self._known) < self.workers:  # reading a key that is not there waits for it
            self._known = [key for key in self._keys if self._store.check([key])]
        return [line.decode() for line in self._store.multi_get(self._known)]

    def connect_again(self) -> None:
        """After an error: make a new connection."""
        self._store = self._origin.clone()

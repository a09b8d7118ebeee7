"""Posts and reads heartbeats and reports through the group's store, signed with a key that the store never sees.

Anybody who reaches the store's port can read, write and remove its lines. The key goes over the connections of the
group, so a line that the workers believe is as genuine as the group itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count

from resist_lightning.comm.group import clone_store
from resist_lightning.comm.sockets import cut_connections, recording
from resist_lightning.comm.torch_collective import GroupCollective
from resist_lightning.faults.messages import Heartbeat, Process, Report, parse, to_line
from resist_lightning.faults.monitors import choose_monitors
from resist_lightning.faults.signature import Signature

CONNECT_SECONDS = 5.0
"""Timeout of a new connection, and of reading a removed line."""

_KEY_BYTES = 32
_instances = count()


@dataclass
class Lines:
    """Messages read from the store.

    Args:
        heartbeats: by worker; of those that have posted one.
        reports: by monitor; of those that have published one.
        tampered: workers and monitors whose line was overwritten by a stranger, or removed.
    """

    heartbeats: dict[int, Heartbeat] = field(default_factory=dict)
    reports: dict[int, Report] = field(default_factory=dict)
    tampered: set[int] = field(default_factory=set)


class Heartbeats:
    """A separate connection to the group's store for heartbeats and reports; any thread may use it, one at a time.

    Calls raise RuntimeError if the store is gone, and do not return while its host is frozen. Only :meth:`introduce`
    is a collective.

    Args:
        own: this process.
        workers: number of processes.
        name: the same for all workers. By default the number of instances that this process has made, which is the
            same if all workers make them equally often.

    Attributes:
        processes: all of them, by rank.
        monitors: the ranks that read all heartbeats and publish reports.
        tampered_lines: number of lines found that no worker has posted, or that were removed.
    """

    def __init__(self, own: Process, workers: int, name: str | None = None) -> None:
        self.own = own
        self.workers = workers
        self.processes: list[Process] = []
        self.monitors: list[int] = []
        self.tampered_lines = 0
        # The store outlives a fit, and the next one must not read its heartbeats.
        self._prefix = f"resist_lightning/heartbeats/{name or next(_instances)}"
        self._heard: set[str] = set()  # places that have had a signed line
        self._doubtful = False  # whether some line may have been removed
        self._sockets: set[str] = set()
        with recording(self._sockets):
            self._store = clone_store()
        self._store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
        # Empty lines, so that after `introduce` each line is there: reading a missing one waits for it.
        self._store.set(self._place_of(own.worker), "")
        if own.worker == 0:
            for number in range(2):
                self._store.set(self._place_of_report(number), "")

    def introduce(self) -> None:
        """Exchange descriptions of all processes, and the key of this run. Collective: every worker must call this."""
        key = secrets.token_bytes(_KEY_BYTES) if self.own.worker == 0 else b""
        # Over the connections of the group: the store is open to anybody.
        told = GroupCollective().gather_bytes(key + to_line(self.own).encode())
        processes = [parse(Process, line.decode()) for line in [told[0][_KEY_BYTES:], *told[1:]]]
        self.begin([process for process in processes if process is not None], told[0][:_KEY_BYTES])

    def begin(self, processes: list[Process], key: bytes) -> None:
        """Set the processes and the key from :meth:`introduce`."""
        self.processes = processes
        self.monitors = choose_monitors(processes)
        self._signature = Signature(key)

    def post(self, heartbeat: Heartbeat) -> None:
        """Post this worker's heartbeat, replacing its last one."""
        place = self._place_of(self.own.worker)
        self._store.set(place, self._signature.sign(place, to_line(heartbeat)))

    def publish(self, report: Report) -> None:
        """Publish this monitor's report, replacing its last one."""
        place = self._place_of_report(self.monitors.index(self.own.worker))
        self._store.set(place, self._signature.sign(place, to_line(report)))

    def read(self, workers: Collection[int]) -> Lines:
        """The reports of all monitors, and the heartbeats of some workers. One request, except after an error."""
        of_reports = {self._place_of_report(number): rank for number, rank in enumerate(self.monitors)}
        of_workers = {self._place_of(worker): worker for worker in workers}
        places = [*of_reports, *of_workers]
        present = self._present(places) if self._doubtful else places
        posted = dict(zip(present, self._store.multi_get(present) if present else [], strict=True))
        lines = Lines()
        for place in places:
            rank = of_reports.get(place, of_workers.get(place, -1))
            line = self._verified(place, posted.get(place))
            if line is None:
                lines.tampered.add(rank)
            elif line and place in of_reports:
                report = parse(Report, line)
                if report is not None:
                    lines.reports[rank] = report
            elif line:
                heartbeat = parse(Heartbeat, line)
                if heartbeat is not None:
                    lines.heartbeats[rank] = heartbeat
        return lines

    def connect_again(self) -> None:
        """Reconnect after an error, and check which lines exist before the next reading."""
        self._doubtful = True
        with recording(self._sockets):
            self._store = self._store.clone()

    def cut(self) -> None:
        """Interrupt a hanging call of another thread; this object cannot be used any more."""
        cut_connections(self._sockets)

    def _verified(self, place: str, posted: bytes | None) -> str | None:
        """The text of a line: empty where none was posted so far, None if it is not its worker's."""
        if posted == b"" and place not in self._heard:
            return ""
        line = self._signature.verify(place, posted) if posted is not None else None
        if line is None:
            self.tampered_lines += 1
        else:
            self._heard.add(place)
        return line

    def _present(self, places: list[str]) -> list[str]:
        if self._store.check(places):
            self._doubtful = False
            return places
        return [place for place in places if self._store.check([place])]

    def _place_of(self, worker: int) -> str:
        return f"{self._prefix}/{worker}"

    def _place_of_report(self, number: int) -> str:
        return f"{self._prefix}/report/{number}"

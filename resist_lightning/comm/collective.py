"""The `Collective` interface, and its single-worker implementation.

Every operation works on flat buffers and counts the bytes it sends, which
:mod:`resist_lightning.comm.byte_formulas` predicts. A worker is one process, or several *members*: processes that hold
the same part of the network and split the worker's batches. Members call everything together, with equal tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor
from typing_extensions import override

from resist_lightning.comm.byte_formulas import KINDS

Finish: TypeAlias = Callable[[], None]
"""Waits for an operation that was started."""

Meanwhile: TypeAlias = Callable[[], None]
"""Work to do while messages travel."""

Row = TypeVar("Row")

Messages: TypeAlias = Mapping[int, Sequence[Tensor]]
"""Flat buffers to, or from, each worker."""


def do_nothing() -> None:
    """No work while messages travel."""


class _Inside:
    """Communication among the members of one worker; none where a worker is one process."""

    def mean_inside(self, flat: Tensor, kind: str) -> None:
        """Replace ``flat`` by its mean over the members of this worker.

        Collective: every member must call this, in the same order.
        """

    def broadcast_inside(self, flat: Tensor, kind: str) -> None:
        """Replace ``flat`` by that of the worker's first member.

        Collective: every member must call this, in the same order.
        """

    def gather_inside(self, text: bytes) -> list[bytes]:
        """Gather bytes, not empty, from this worker's members, in order; only the first member gets any.

        Collective: every member must call this, in the same order.
        """
        return [text]


class Collective(_Inside, ABC):
    """Operations by which one worker communicates with the others.

    Args:
        worker: number of this process's worker.
        workers: number of workers.
        member: number of this process among the members of its worker.
        members: number of members of each worker.

    Attributes:
        sent_bytes: bytes that this process has sent to other workers, by kind (see
            :data:`resist_lightning.comm.byte_formulas.KINDS`).
        inside_bytes: bytes that it has sent to other members of its worker, by kind.
    """

    def __init__(self, worker: int, workers: int, member: int = 0, members: int = 1) -> None:
        self.worker = worker
        self.workers = workers
        self.member = member
        self.members = members
        self.sent_bytes: Counter[str] = Counter()
        self.inside_bytes: Counter[str] = Counter()

    @property
    def rank(self) -> int:
        """The number of this process among those of all workers."""
        return self.worker * self.members + self.member

    @property
    def processes(self) -> int:
        """Number of processes of all workers together."""
        return self.workers * self.members

    def by_worker(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Rows gathered from all processes, grouped by worker."""
        return [rows[first : first + self.members] for first in range(0, self.processes, self.members)]

    def connect(self) -> None:
        """Connect all pairs of workers, where the backend would connect at the first message and delay the first syncs.

        Collective: every worker must call this, in the same order.
        """

    @abstractmethod
    def beside(self) -> Collective:
        """The same workers over separate connections, so that another thread may communicate with them meanwhile.

        Bytes that it sends are counted here. Collective: every worker must call this, in the same order.
        """

    @abstractmethod
    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Numbers of all processes, by rank. Collective: every worker must call this, in the same order."""

    @abstractmethod
    def gather_bytes(self, text: bytes) -> list[bytes]:
        """Bytes of all processes, by rank, of any length.

        Collective: every worker must call this, in the same order.
        """

    def gather_sent_bytes(self) -> dict[str, list[int]]:
        """Bytes that each worker has sent to others so far, by kind.

        Collective: every worker must call this, in the same order.
        """
        by_worker = self.by_worker(self.gather_numbers([self.sent_bytes[kind] for kind in KINDS]))
        found: dict[str, list[int]] = {}
        for place, kind in enumerate(KINDS):
            found[kind] = [int(sum(row[place] for row in rows)) for rows in by_worker]
        return found

    @abstractmethod
    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        """Start an all-reduce of ``flat`` over the workers: the sum, or the maximum of integers and booleans.

        Collective: every worker must call this, in the same order, with the same size and data type.

        Returns:
            A function that waits for the result and returns it: in ``flat``, or in a buffer on the device that sends.
            Until it has returned, ``flat`` must not be touched; other operations may run.
        """

    @abstractmethod
    def broadcast_(self, flat: Tensor, kind: str) -> None:
        """Replace ``flat`` by worker 0's. Collective: every worker must call this, in the same order."""

    @abstractmethod
    def exchange(
        self, sends: Messages, receives: Messages, kinds: Mapping[str, int], meanwhile: Meanwhile = do_nothing
    ) -> None:
        """Send and receive flat buffers, all at once.

        Not a collective of all: only pairs of workers that have a message take part, and both must call it.

        Args:
            sends: for each target worker, flat buffers to send.
            receives: for each source worker, flat buffers to fill.
            kinds: bytes of ``sends`` by kind.
            meanwhile: work on this worker, done while the buffers travel; it must leave them alone.
        """

    @abstractmethod
    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        """Begin to send a tensor to one worker, which must call :meth:`start_receive` with the same tag.

        Of several messages with one tag, the first sent is the first received.

        Returns:
            A function that waits until ``flat`` may be written to again.
        """

    @abstractmethod
    def start_receive(self, flat: Tensor, source: int, tag: int) -> Finish:
        """Begin to receive a tensor of the shape of ``flat`` from one worker; see :meth:`start_send`.

        Returns:
            A function that waits for it; ``flat`` must be left alone until then.
        """


class SoloCollective(Collective):
    """The collective of a single worker: it sends nothing."""

    def __init__(self) -> None:
        super().__init__(worker=0, workers=1)

    @override
    def beside(self) -> Collective:
        return self

    @override
    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers)]

    @override
    def gather_bytes(self, text: bytes) -> list[bytes]:
        return [text]

    @override
    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        return lambda: flat

    @override
    def broadcast_(self, flat: Tensor, kind: str) -> None:
        pass

    @override
    def exchange(
        self, sends: Messages, receives: Messages, kinds: Mapping[str, int], meanwhile: Meanwhile = do_nothing
    ) -> None:
        meanwhile()

    @override
    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        raise ValueError(f"worker {target} does not exist: this run has one worker.")

    @override
    def start_receive(self, flat: Tensor, source: int, tag: int) -> Finish:
        raise ValueError(f"worker {source} does not exist: this run has one worker.")

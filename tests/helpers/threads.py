"""Workers as threads of one process: a collective in plain Python, for tests of its callers."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from resist_lightning.comm.collective import Collective, Finish, Meanwhile, Messages, do_nothing

SECONDS = 20.0


class _Hooks(OrderedDict[int, Any]):
    """Global optimizer hooks, of which a thread runs only its own: outside of tests a worker is a process."""

    def __init__(self) -> None:
        super().__init__()
        self._threads: dict[int, int] = {}

    def __setitem__(self, key: int, hook: Any) -> None:
        self._threads[key] = threading.get_ident()
        super().__setitem__(key, hook)

    def values(self) -> Any:
        mine = threading.get_ident()
        return [hook for key, hook in list(self.items()) if self._threads[key] == mine]


torch_optimizer._global_optimizer_pre_hooks = _Hooks()
torch_optimizer._global_optimizer_post_hooks = _Hooks()


class Room:
    """The shared state of a test's workers: barrier, message queues and log."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.barrier = threading.Barrier(workers, timeout=SECONDS)
        self.table: dict[Any, Any] = {}
        self.log: list[tuple[int, str, str]] = []
        self.boxes: dict[tuple[int, int, int], Queue[Tensor]] = {}
        self._lock = threading.Lock()
        self._beside: Room | None = None

    def beside(self) -> Room:
        """Another room with the same workers and the same log."""
        with self._lock:
            if self._beside is None:
                self._beside = Room(self.workers)
                self._beside.log = self.log
            return self._beside

    def box(self, source: int, target: int, tag: int) -> Queue[Tensor]:
        """The queue of messages with a tag from one worker to another."""
        # Locked: both sides may be the first to ask, and of two queues one would be lost, with its message.
        with self._lock:
            return self.boxes.setdefault((source, target, tag), Queue())

    def share(self, worker: int, value: Any) -> list[Any]:
        """All-gather a value; returns the values of all workers, in order."""
        self.table[worker] = value
        self.barrier.wait()
        values = [self.table[index] for index in range(self.workers)]
        self.barrier.wait()
        return values


class ThreadCollective(Collective):
    """A worker in a room. Messages are copied, so that no worker sees another's memory."""

    def __init__(self, room: Room, worker: int) -> None:
        super().__init__(worker, room.workers)
        self.room = room

    def beside(self) -> Collective:
        other = ThreadCollective(self.room.beside(), self.worker)
        other.sent_bytes = self.sent_bytes
        return other

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        self.room.log.append((self.worker, "gather_numbers", "control"))
        return [list(row) for row in self.room.share(self.worker, list(numbers))]

    def gather_bytes(self, text: bytes) -> list[bytes]:
        self.room.log.append((self.worker, "gather_bytes", "control"))
        return list(self.room.share(self.worker, text))

    def start_all_reduce(self, flat: Tensor, kind: str) -> Callable[[], Tensor]:
        self.room.log.append((self.worker, "start_all_reduce", kind))
        stacked = torch.stack(self.room.share(self.worker, flat.clone()))
        reduced = stacked.sum(0) if flat.is_floating_point() else stacked.max(0).values
        return lambda: reduced

    def broadcast_(self, flat: Tensor, kind: str) -> None:
        self.room.log.append((self.worker, "broadcast_", kind))
        flat.copy_(self.room.share(self.worker, flat.clone())[0])
        if self.worker == 0:
            self.sent_bytes[kind] += flat.nbytes * (self.workers - 1)

    def exchange(
        self, sends: Messages, receives: Messages, kinds: Mapping[str, int], meanwhile: Meanwhile = do_nothing
    ) -> None:
        self.room.log.append((self.worker, "exchange", "+".join(sorted(kinds))))
        sends = {peer: [flat.clone() for flat in flats] for peer, flats in sends.items()}
        meanwhile()
        offered = self.room.share(self.worker, sends)
        wanted = {peer: offered[peer].get(self.worker, []) for peer in range(self.workers) if peer != self.worker}
        expected = {peer for peer, flats in receives.items() if flats}
        assert {peer for peer, flats in wanted.items() if flats} == expected, "a message nobody waits for"
        for peer, flats in receives.items():
            for flat, came in zip(flats, wanted[peer], strict=True):
                assert (flat.dtype, flat.shape) == (came.dtype, came.shape)
                flat.copy_(came)
        self.sent_bytes.update(kinds)

    def start_send(self, flat: Tensor, target: int, tag: int, kind: str) -> Finish:
        self.room.log.append((self.worker, "start_send", kind))
        self.room.box(self.worker, target, tag).put(flat.clone())
        self.sent_bytes[kind] += flat.nbytes
        return lambda: None

    def start_receive(self, flat: Tensor, source: int, tag: int) -> Finish:
        self.room.log.append((self.worker, "start_receive", ""))
        box = self.room.box(source, self.worker, tag)

        def finish() -> None:
            came = box.get(timeout=SECONDS)
            assert (flat.dtype, flat.shape) == (came.dtype, came.shape)
            flat.copy_(came)

        return finish


def run_threads(target: Callable[..., Any], workers: int, *args: Any) -> tuple[list[Any], Room]:
    """Call ``target(collective, *args)`` for each worker; returns the values in order, and the room."""
    room = Room(workers)

    def work(worker: int) -> Any:
        try:
            return target(ThreadCollective(room, worker), *args)
        except BaseException:
            room.barrier.abort()
            raise

    return call_in_threads(work, workers, consequences=(threading.BrokenBarrierError, Empty)), room


@contextmanager
def _on_one_core() -> Iterator[None]:
    """Threads started in the body share a core: on two they would contend for the GIL at each operation."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    # By pid, so that the processes of pytest-xdist are spread over the cores.
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Inside, no garbage is collected.

    Within torch's get_rng_state a collection may release the interpreter's lock, but not the generator's, and two
    threads then wait for each other for ever. Real workers are processes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def call_in_threads(
    work: Callable[[int], Any], workers: int, consequences: type[BaseException] | tuple[type[BaseException], ...]
) -> list[Any]:
    """Call ``work(worker)`` in a thread for each worker; returns the values in order.

    Args:
        work: called with the worker's number.
        workers: number of workers.
        consequences: errors that one worker raises because of another's; others are raised before them.
    """
    with _on_one_core(), _without_garbage_collection(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, worker) for worker in range(workers)]
    if "torch._dynamo" in sys.modules:
        # Workers force eager code for a moment. The setting is per process: a thread may restore another one's value.
        torch.compiler.set_stance("default")
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, consequences)):
        raise error
    return [future.result() for future in futures]

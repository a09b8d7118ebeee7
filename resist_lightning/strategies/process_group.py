"""The process group of a strategy: joined when a worker starts, and left when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.utilities import rank_zero_info

from resist_lightning.comm.backends import binds, uses_nccl
from resist_lightning.comm.group import (
    abandon_group,
    abort_nccl,
    destroy_abandoned_group,
    destroy_group,
    group_exists,
    join_group,
)
from resist_lightning.comm.members import split_into_workers
from resist_lightning.comm.rendezvous import HostsCannotMeet
from resist_lightning.errors import WorkerLost
from resist_lightning.faults.host import this_process
from resist_lightning.faults.start_watch import StartWatch
from resist_lightning.strategies.launching.guard import Guard, parent_watcher
from resist_lightning.strategies.options import StrategyOptions


class ProcessGroup:
    """The default group of torch.distributed, which the user's program may have made before.

    Attributes:
        members: processes of each worker.
    """

    def __init__(self, options: StrategyOptions) -> None:
        self.members = 1
        self._options = options
        self._owned = False
        self._left = False  # whether a group of its own was left in good order
        self._how: tuple[ClusterEnvironment, str, torch.device] | None = None  # how the newest one was made

    def join(self, environment: ClusterEnvironment, backend: str, device: torch.device) -> None:
        """Join the group, unless the user's program has done so.

        Lightning's own way would let the next group of a process use the last one's names in the store.
        """
        destroy_abandoned_group()  # of a fit that ended with an error, in this process
        self._owned, self._left = not group_exists(), False
        if uses_nccl(backend):
            rank_zero_info(
                "The workers communicate over NCCL, with which this package is not tested on GPUs yet: please report "
                "problems. process_group_backend='gloo' sends the same numbers through the hosts' memory."
            )
        if self._owned:
            self._how = environment, backend, device
            self._make(*self._how)

    def _make(self, environment: ClusterEnvironment, backend: str, device: torch.device) -> None:
        own = this_process(environment.global_rank())
        address, port, workers = environment.main_address, environment.main_port, environment.world_size()
        watch = StartWatch(own, workers, address, port, parent_watcher())
        try:
            with watch:
                join_group(
                    backend,
                    address=address,
                    port=port,
                    worker=own.worker,
                    workers=workers,
                    timeout=self._options.timeout,
                    device=device if binds(backend, device) else None,
                    node=environment.node_rank(),
                )
        except RuntimeError as error:
            if watch.lost:
                raise WorkerLost(watch.lost) from error
            missing = "" if isinstance(error, HostsCannotMeet) else watch.missing()
            if missing:
                raise RuntimeError(f"{missing} {error}") from error
            raise

    def split(self, processes_per_host: int) -> None:
        """Divide the processes into workers. Collective: every process must call this, after :meth:`join`."""
        self.members = self._options.members(processes_per_host)
        split_into_workers(self.members, across_hosts=self._options.across_hosts)

    def leave(self, guard: Guard, barrier: Callable[[], None], *, interrupted: bool) -> None:
        """Stop watching the others and leave the group, if this object has joined it.

        Args:
            guard: of this worker.
            barrier: of the strategy. Collective.
            interrupted: whether an error has ended the run. Then nobody waits: the others may be gone.
        """
        owned = self._owned and group_exists()
        leaving = owned and not interrupted
        if owned:
            abandon_group()  # also where the barrier below fails
        if leaving:
            with guard.around():
                barrier()
        guard.end()
        if owned and interrupted:
            abort_nccl()
        if leaving:
            destroy_group()  # without this, gloo aborted 5 of 30 processes at exit
            self._left = True

    @contextmanager
    def rejoined(self, barrier: Callable[[], None]) -> Iterator[None]:
        """Inside, the group that was left at the end of a run exists again; does nothing where there is one.

        Collective after a run: every process must enter this, in the same order.

        Args:
            barrier: of torch.distributed. Collective.
        """
        if not self._left or self._how is None or group_exists():
            yield
            return
        self._make(*self._how)
        try:
            yield
            barrier()  # who closes connections early takes from the others what they have not read
        except BaseException:
            abort_nccl()
            raise
        finally:
            destroy_group()

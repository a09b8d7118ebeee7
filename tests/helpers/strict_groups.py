"""Members of workers as threads with NCCL's rules: the package's own `MemberCollective`, without processes.

Its calls of torch.distributed are answered by the network of :mod:`tests.helpers.strict_collective`, which has a
queue for each group. Everything else is the package's: the parts, the groups, the order of operations, the polling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from resist_lightning.comm import member_collective, torch_collective
from resist_lightning.comm.member_collective import MemberCollective, Members
from tests.helpers.strict_collective import Network, Operation, post_checked, run_on_network

Group = tuple[int, ...]

_MODULES = (member_collective, torch_collective)


@dataclass(frozen=True)
class _Message:
    """A send or a receive that has not begun."""

    kind: str
    tensor: Tensor
    peer: int
    group: Group | None = None
    tag: int = 0


@dataclass(frozen=True)
class _Work:
    """An operation that has begun, as torch returns it."""

    network: Network
    operation: Operation

    def is_completed(self) -> bool:
        """Waits, where NCCL's would be polled: the network detects a deadlock only if all workers wait."""
        self.network.wait(self.operation)
        return True

    def wait(self, timeout: timedelta | None = None) -> bool:
        return self.is_completed()


class StrictDistributed:
    """The functions of torch.distributed that the package's collectives call, for each thread as its rank."""

    ReduceOp = dist.ReduceOp
    ProcessGroup = dist.ProcessGroup
    isend, irecv = "send", "receive"
    P2POp = _Message

    def __init__(self) -> None:
        self.local = threading.local()

    def get_rank(self) -> int:
        return int(self.local.rank)

    def get_world_size(self) -> int:
        return int(self.local.network.workers)

    def get_backend_config(self) -> str:
        return "cpu:nccl"  # so that the collectives take the way of NCCL

    def all_reduce(self, tensor: Tensor, *, async_op: bool, op: Any = None, group: Group | None = None) -> _Work:
        return self._begin("all_reduce", group, inputs=[tensor])

    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool, group: Group | None = None) -> _Work:
        root = (group or range(self.get_world_size())).index(src)
        return self._begin("broadcast", group, inputs=[tensor], root=root)

    def all_gather_into_tensor(
        self, gathered: Tensor, mine: Tensor, *, async_op: bool, group: Group | None = None
    ) -> _Work:
        size = len(group) if group else self.get_world_size()
        return self._begin("all_gather", group, inputs=[mine], outputs=[gathered.view(size, *mine.shape)])

    def batch_isend_irecv(self, messages: Sequence[_Message]) -> list[_Work]:
        sends = [(message.peer, message.tensor) for message in messages if message.kind == "send"]
        receives = [(message.peer, message.tensor) for message in messages if message.kind == "receive"]
        return [self._begin("exchange", messages[0].group, sends=sends, receives=receives)]

    def _begin(self, what: str, group: Group | None, **given: Any) -> _Work:
        network = self.local.network
        operation = Operation(self.get_rank(), what, group=group or (), **given)
        post_checked(network, operation, torch.device("cpu"))
        return _Work(network, operation)


def run_members_strictly(
    target: Callable[..., Any], workers: int, members: int, *args: Any
) -> tuple[list[Any], Network]:
    """Call ``target(collective, *args)`` for each member of each worker; returns values by rank, and the network."""
    distributed = StrictDistributed()
    ranks = range(workers * members)

    def work(network: Network, rank: int) -> Any:
        distributed.local.network, distributed.local.rank = network, rank
        worker, member = divmod(rank, members)
        inside: Any = tuple(ranks[worker * members : (worker + 1) * members])
        between: Any = tuple(ranks[member::members])
        split = Members(members, inside, between)
        return target(MemberCollective(split, torch.device("cpu")), *args)

    with patch.object(_MODULES[0], "dist", distributed), patch.object(_MODULES[1], "dist", distributed):
        return run_on_network(work, len(ranks))

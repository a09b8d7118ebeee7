"""Records a worker's messages in torch's dispatcher, below the Python of torch.distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_group, _world
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Call:
    """A call of a collective, or of a send or receive with a peer."""

    verb: str
    payload_bytes: int
    dtype: torch.dtype
    peer: int | None = None


class Quantizer(TorchDispatchMode):
    """While it is entered, lists every call that this thread makes to a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(_read(func._schema.name.removeprefix("c10d::"), args))
        return func(*args, **(kwargs or {}))

    def take(self) -> list[Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


def _read(name: str, args: Sequence[Any]) -> Call:
    verbs = {"allreduce_": 0, "broadcast_": 0, "_allgather_base_": 1, "send": 0, "recv_": 0}
    if name not in verbs:
        return Call(name, 0, torch.float32)
    tensors = args[verbs[name]]
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    peer = args[2] if name in ("send", "recv_") else None
    return Call(name, sum(tensor.nbytes for tensor in tensors), tensors[0].dtype, peer)


def sent_bytes(calls: Sequence[Call], worker: int, workers: int) -> Counter[str]:
    """Bytes that this worker sends in these calls, by operation: 2 (S - 1) / S of an all-reduce, rounded up."""
    sent: Counter[str] = Counter()
    for call in calls:
        copies = {"send": 1, "_allgather_base_": workers - 1, "broadcast_": (workers - 1) * (worker == 0), "recv_": 0}
        if call.verb == "allreduce_":
            sent[call.verb] += -((-2 * (workers - 1) * call.payload_bytes) // workers)
        else:
            sent[call.verb] += copies[call.verb] * call.payload_bytes
    return sent


def collectives_so_far() -> int:
    """The group's own count of its collectives and messages, in C++."""
    return int(_get_default_group()._get_sequence_number_for_group())


def groups() -> int:
    """Number of process groups."""
    return len(_world.pg_map) if distributed.is_initialized() else 0

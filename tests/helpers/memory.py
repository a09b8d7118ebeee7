"""Bytes allocated by the tensors that training keeps, and a wide network whose bytes stand out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.harness.memory import allocated_bytes
from tests.helpers.nets import MlpBlock, mlp

WIDTH, BLOCKS = 256, 6
BLOCK_BYTES = 4 * (2 * WIDTH * 2 * WIDTH + 3 * WIDTH)
SHARED_BYTES = 4 * (3 * WIDTH + WIDTH + 4 * WIDTH + 4)
NOISE_BYTES = 400_000  # other allocations of Python and torch; less than one weight of a block


def wide_net() -> nn.Module:
    """Six blocks, ``body.0`` to ``body.5``, of `BLOCK_BYTES` each; stem and head have `SHARED_BYTES`."""
    return mlp(MlpBlock, BLOCKS, WIDTH)


def kept_tensors(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[Tensor]:
    """Parameters, gradients and optimizer state; not buffers."""
    for parameter in module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def storage_bytes(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> int:
    """Allocated bytes of parameters, gradients and optimizer state; memory that tensors share counts once."""
    storages = {}
    for tensor in kept_tensors(module, optimizers):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), storage.device] = storage.nbytes()
    return sum(storages.values())


def settled_bytes(limit: int, patience_seconds: float) -> int:
    """Allocated bytes; gloo's threads may hold on to the last buffers for a moment."""
    deadline = time.monotonic() + patience_seconds
    while (allocated := allocated_bytes()) > limit and time.monotonic() < deadline:
        time.sleep(0.005)
    return allocated

"""Bytes allocated by the tensors that training keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer


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

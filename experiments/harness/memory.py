"""Bytes that a worker holds, counted from its live tensors, and as the kernel sees them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, more: Iterable[Tensor] = ()) -> int:
    """Bytes of all distinct storages of parameters, gradients, optimizer state, and ``more``."""
    tensors = list(more)
    for parameter in model.parameters():
        tensors.append(parameter)
        if parameter.grad is not None:
            tensors.append(parameter.grad)
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return storage_bytes(tensors)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages: views of one are counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if not tensor.is_meta:  # of what another worker holds there is a shape only
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

"""Bytes that a worker holds, counted from its live tensors, and as the kernel sees them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all distinct storages of parameters, gradients and optimizer state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parameters = list(model.parameters())
    return storage_bytes([*parameters, *(p.grad for p in parameters if p.grad is not None), *states])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

"""Bytes that a worker holds, counted from its live tensors, and as the kernel sees them."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

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
        if not tensor.is_meta:  # of tensors that another worker holds there is a shape only
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def can_ask_malloc() -> bool:
    """Whether ``allocated_bytes`` works: with glibc 2.33 or later."""
    return platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallinfo2")


def allocated_bytes() -> int:
    """Bytes that the process has allocated by malloc and not freed, torch's tensors on the CPU included."""
    info = _mallinfo()()
    return int(info.hblkhd + info.uordblks)


@cache
def _mallinfo() -> Any:
    # Made once: each CDLL is a reference cycle, and a test without garbage collection would measure those.
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo
    return ask


def allocate_large_tensors_apart() -> None:
    """From now on blocks of 64 KiB and more come from mmap: counted in every thread, and gone when freed."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)

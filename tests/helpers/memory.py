"""Bytes that are really allocated: by the tensors that training keeps, and by the process."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

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
    """Allocated bytes of parameters, gradients and optimizer state; what two tensors share counts once."""
    storages = {}
    for tensor in kept_tensors(module, optimizers):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), storage.device] = storage.nbytes()
    return sum(storages.values())


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def can_ask_malloc() -> bool:
    """Whether ``allocated_bytes`` works: with glibc 2.33 or later."""
    return platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallinfo2")


def allocated_bytes() -> int:
    """Bytes that the process has got from malloc and not given back, torch's tensors on the CPU included."""
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

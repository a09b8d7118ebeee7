"""Copies of inputs that are kept; those of GPU tensors are in host memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def copied(values: Any) -> Any:
    """Copies of all tensors: a forward may change its input in place, and a loader may reuse its memory."""

    def one(value: Any) -> Any:
        if isinstance(value, _OnHost):
            return value.back()
        return value.detach().clone() if isinstance(value, Tensor) else value

    return tree_map(one, values)


def recorded(values: Any) -> Any:
    """Like :func:`copied`, with the copies of GPU tensors in host memory, where :func:`can_be_pinned`."""

    def one(value: Any) -> Any:
        on_gpu = isinstance(value, Tensor) and value.is_cuda
        return _OnHost(value) if on_gpu and can_be_pinned(value) else value

    return tree_map(one, copied(values))


def can_be_pinned(tensor: Tensor) -> bool:
    """Whether a copy may lie in pinned memory: torch refuses that of a sparse tensor, such as a graph's edges."""
    return tensor.layout == torch.strided and not tensor.is_nested


def moved(values: Any, device: torch.device) -> Any:
    """Copies of all tensors on a device."""

    def one(value: Any) -> Any:
        if isinstance(value, _OnHost):
            value = value.back()
        return value.to(device) if isinstance(value, Tensor) else value

    return tree_map(one, values)


class _OnHost:
    """A GPU tensor in host memory, copied there while the GPU goes on computing."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = _copying_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._values.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is used until then
        self._arrived = stream.record_event()

    def back(self) -> Tensor:
        """The tensor, on its device."""
        self._arrived.synchronize()
        return self._values.to(self._device, non_blocking=True)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

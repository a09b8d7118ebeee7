"""Keeps tensors in one flat buffer, so that averaging them needs neither packing nor a second copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from resist_lightning.comm.packing import by_dtype


class Bucket:
    """Tensors of one data type and device, moved into one flat buffer. They stay the same Python objects.

    Args:
        tensors: dense ones, present; not empty.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._offsets = [0]
        for tensor in tensors:
            self._offsets.append(self._offsets[-1] + tensor.numel())
        self.flat = torch.empty(self._offsets[-1], dtype=tensors[0].dtype, device=tensors[0].device)
        for tensor, place in zip(self._tensors, self._places(), strict=True):
            tensor.data = place.copy_(tensor.detach())

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are all its tensors, in order, each still in its place (``.to()`` gives it another one)."""
        return len(tensors) == len(self._tensors) and all(
            tensor is own and tensor.data_ptr() == place.data_ptr()
            for tensor, own, place in zip(tensors, self._tensors, self._places(), strict=True)
        )

    def dissolve(self) -> None:
        """Give every tensor memory of its own again: who saves one of them must not save them all."""
        for tensor, place in zip(self._tensors, self._places(), strict=True):
            if tensor.data_ptr() == place.data_ptr():
                tensor.data = tensor.detach().clone()
        self._tensors = []

    def _places(self) -> list[Tensor]:
        """The piece of the buffer for each tensor, in its shape and memory format."""
        return [
            self.flat.as_strided(tensor.size(), tensor.stride(), offset)
            for tensor, offset in zip(self._tensors, self._offsets, strict=False)
        ]


def make_buckets(tensors: Iterable[Tensor], device: torch.device) -> dict[torch.dtype, Bucket]:
    """A bucket for each data type.

    A data type is left out if one of its tensors is on another device, has gaps, or shares its memory with somebody:
    who looks at that memory would no longer see the tensor.
    """
    buckets = {}
    for dtype, group in by_dtype(tensors).items():
        in_place = all(tensor.device == device and _dense(tensor) for tensor in group)
        if in_place and _alone(group):
            buckets[dtype] = Bucket(group)
    return buckets


def _alone(tensors: Sequence[Tensor]) -> bool:
    """Whether each has memory of its own, and all of it."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    whole = all(storage.nbytes() == tensor.nbytes for storage, tensor in zip(storages, tensors, strict=True))
    return whole and len({storage.data_ptr() for storage in storages}) == len(storages)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.size(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True

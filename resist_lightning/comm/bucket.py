"""Keeps tensors in one flat buffer, so that averaging them needs neither packing nor a second copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from resist_lightning.comm.packing import by_dtype


class Bucket:
    """Dense tensors of one data type and device, moved into one flat buffer. They stay the same Python objects."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._offsets = []
        entries = 0
        for tensor in tensors:
            self._offsets.append(entries)
            entries += tensor.numel()
        self.flat = torch.empty(entries, dtype=tensors[0].dtype, device=tensors[0].device)
        for tensor, place in zip(self._tensors, self._places(), strict=True):
            tensor.data = place.copy_(tensor.detach())

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are all its tensors, in order, each still in its place (``.to()`` gives it another one)."""
        if len(tensors) != len(self._tensors):
            return False
        for tensor, own, place in zip(tensors, self._tensors, self._places(), strict=True):
            if tensor is not own or tensor.data_ptr() != place.data_ptr():
                return False
        return True

    def dissolve(self) -> None:
        """Give every tensor memory of its own again: who saves one of them must not save them all."""
        for tensor, place in zip(self._tensors, self._places(), strict=True):
            if tensor.data_ptr() == place.data_ptr():
                tensor.data = tensor.detach().clone()
        self._tensors, self._offsets = [], []

    def _places(self) -> list[Tensor]:
        """The piece of the buffer for each tensor, in its shape and memory format."""
        places = []
        for tensor, offset in zip(self._tensors, self._offsets, strict=True):
            places.append(self.flat.as_strided(tensor.size(), tensor.stride(), offset))
        return places


def make_buckets(tensors: Iterable[Tensor], device: torch.device) -> dict[torch.dtype, Bucket]:
    """A bucket for each data type.

    A data type is left out if one of its tensors is on another device, has gaps, or shares its memory with somebody:
    who looks at that memory would no longer see the tensor.
    """
    buckets = {}
    for dtype, group in by_dtype(tensors).items():
        in_place = all(tensor.device == device and _owns_storage(tensor) and _dense(tensor) for tensor in group)
        if in_place and len({tensor.data_ptr() for tensor in group}) == len(group):
            buckets[dtype] = Bucket(group)
    return buckets


def _owns_storage(tensor: Tensor) -> bool:
    """Whether the tensor fills its storage: a view of a larger one does not."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps."""
    dimensions = zip(tensor.stride(), tensor.size(), strict=True)
    expected = 1
    # From the innermost one outwards.
    for stride, size in sorted(dimensions):
        # The stride of a dimension of one element has no meaning.
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True

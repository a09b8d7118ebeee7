"""Keeps tensors in one flat buffer, so that averaging them needs neither packing nor a second copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from resist_lightning.comm.packing import by_dtype

_ALIGNMENT = 256  # bytes; vectorized kernels need 16, and no caller relies on more than an allocator guarantees


class Bucket:
    """Tensors of one data type that are averaged in one flat buffer. They stay the same Python objects.

    Most live in the buffer. Those that cannot (they share memory with others, have gaps, or are on another device), and
    those that have left it (``.to()`` gives a tensor new memory), are copied in and out.

    Args:
        tensors: of one data type.
        device: of the buffer.

    Attributes:
        flat: the buffer, without gaps.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = list(tensors)
        self._offsets = _offsets(tensors)
        entries = sum(tensor.numel() for tensor in tensors)
        self.flat = torch.empty(entries, dtype=tensors[0].dtype, device=device)
        shared = Counter(tensor.data_ptr() for tensor in tensors)
        for tensor, place in zip(self._tensors, self._places(), strict=True):
            alone = _owns_storage(tensor) and shared[tensor.data_ptr()] == 1
            if alone and tensor.device == self.flat.device and _dense(tensor):
                tensor.data = place.copy_(tensor.detach())

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are all its tensors, in the order in which they were given."""
        if len(tensors) != len(self._tensors):
            return False
        return all(tensor is own for tensor, own in zip(tensors, self._tensors, strict=True))

    def collect(self) -> None:
        """Copy the values of tensors that live elsewhere into the buffer."""
        for tensor, place in self._elsewhere():
            place.copy_(tensor.detach())

    def spread(self) -> None:
        """Copy the buffer's values to tensors that live elsewhere."""
        for tensor, place in self._elsewhere():
            tensor.detach().copy_(place)

    def dissolve(self) -> None:
        """Give every tensor its own memory again: saving one of them must not save the whole buffer."""
        for tensor, place in zip(self._tensors, self._places(), strict=True):
            if tensor.data_ptr() == place.data_ptr():
                tensor.data = tensor.detach().clone()
        self._tensors, self._offsets = [], []

    def _elsewhere(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that do not live in the buffer, with their pieces of it."""
        pairs = zip(self._tensors, self._places(), strict=True)
        return [(tensor, place) for tensor, place in pairs if tensor.data_ptr() != place.data_ptr()]

    def _places(self) -> list[Tensor]:
        """The piece of the buffer for each tensor, in its shape and, unless that has gaps, its memory format."""
        places = []
        for tensor, offset in zip(self._tensors, self._offsets, strict=True):
            if _dense(tensor):
                places.append(self.flat.as_strided(tensor.size(), tensor.stride(), offset))
            else:
                places.append(self.flat[offset : offset + tensor.numel()].view(tensor.size()))
        return places


def make_buckets(tensors: Iterable[Tensor], device: torch.device) -> dict[torch.dtype, Bucket]:
    """A bucket for each data type."""
    return {dtype: Bucket(group, device) for dtype, group in by_dtype(tensors).items()}


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Offset of each tensor in the buffer, in entries.

    Tensors are laid out by the largest power of two that divides their size, in descending order, so that each is
    aligned as well as its size allows, without padding that would be averaged too.
    """
    order = sorted(range(len(tensors)), key=lambda index: -_power_of_two_in(tensors[index].nbytes))
    offsets = [0] * len(tensors)
    entries = 0
    for index in order:
        offsets[index] = entries
        entries += tensors[index].numel()
    return offsets


def _power_of_two_in(size: int) -> int:
    """The largest power of two that divides a size in bytes, at most `_ALIGNMENT`."""
    return min(size & -size, _ALIGNMENT) or _ALIGNMENT


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

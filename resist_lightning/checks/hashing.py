"""Hashes the bits of tensors, on the device where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLED_SHARE = 64
"""A sample has one in so many entries."""

# Checkpoints have hashes of full models (engine/evaluation), so none of these numbers may change.
_WHOLE_BELOW = 4096
_CHUNK = 2**14
_RUN = 16  # a cache line of float32
_FACTOR = 0x2545F4914F6CDD1D
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Hasher:
    """Hashes tensors: each entry's bits, as an integer, times a number that depends on its place; summed, modulo 2**64.

    Every number is odd, so that a change of one entry always shows; they all differ, so that an exchange of two does.

    Args:
        share: hash one in so many entries of a large tensor. Tensors below 4096 entries are always hashed whole.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._multipliers: dict[torch.device, Tensor] = {}

    def hashes(self, tensors: Iterable[Tensor], turn: int = 0) -> list[Tensor]:
        """For each tensor a scalar int64 on its device; nothing waits for a GPU.

        Args:
            tensors: present ones.
            turn: selects the entries of the sample; as many turns as ``share`` cover all.
        """
        return [self._hash(_bits(tensor), turn) for tensor in tensors]

    def _hash(self, bits: Tensor, turn: int) -> Tensor:
        if self._share > 1 and len(bits) >= _WHOLE_BELOW:
            bits = self._sample(bits, turn)
        multipliers = self._multipliers_on(bits.device)
        # In chunks, so that one table of multipliers serves tensors of any size.
        first, *others = bits.split(_CHUNK)
        total: Tensor = (first * multipliers[: len(first)]).sum()
        for chunk in others:
            part = (chunk * multipliers[: len(chunk)]).sum()
            total = total * _FACTOR + part
        return total

    def _sample(self, bits: Tensor, turn: int) -> Tensor:
        """Runs of neighbours, evenly spread, and the incomplete last row; single entries would load all memory."""
        row = _RUN * self._share
        end = len(bits) // row * row
        start = turn % self._share * _RUN
        runs = bits[:end].view(-1, row)[:, start : start + _RUN]
        return torch.cat([runs.reshape(-1), bits[end:]])

    def _multipliers_on(self, device: torch.device) -> Tensor:
        if device not in self._multipliers:
            places = torch.arange(1, _CHUNK + 1, device=device)
            self._multipliers[device] = _mix(places) | 1
        return self._multipliers[device]


def as_numbers(hashes: Iterable[Tensor]) -> list[float]:
    """The upper 48 bits of hashes, to be sent: those depend on all bits of all entries. Waits for a GPU."""
    on_cpu = [value.cpu() for value in hashes]
    if not on_cpu:
        return []
    numbers = torch.stack(on_cpu).tolist()
    # A float64 is exact up to 53 bits; a shifted negative number has ones from the left.
    return [float((number >> 16) & (2**48 - 1)) for number in numbers]


def together(hashes: list[Tensor]) -> Tensor:
    """One combined hash of several."""
    stacked = torch.stack([value.to(hashes[0].device) for value in hashes])
    # By place, or two swapped tensors would not show.
    places = torch.arange(len(stacked), device=stacked.device)
    return _mix(stacked + places).sum()


def _bits(tensor: Tensor) -> Tensor:
    """The entries of a tensor as integers, flat, in the order of its memory; a view unless it has gaps."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dimension: strides[dimension], reverse=True)
    flat = tensor.view(_INTEGERS[tensor.element_size()]).permute(order).reshape(-1)
    # In halves: multiplied modulo 2**64, the highest bits of 64 would hardly count.
    return flat.view(torch.int32) if flat.dtype == torch.int64 else flat


def _mix(values: Tensor) -> Tensor:
    """Pseudo-random integers, one for each (the end of splitmix64)."""
    values = values * -7046029254386353131
    values = (values ^ _shifted(values, 30)) * -4658895280553007687
    values = (values ^ _shifted(values, 27)) * -7723592293110705685
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """The values shifted to the right, with zeros from the left."""
    mask: int = 2 ** (64 - places) - 1
    return (values >> places) & mask


_MARKS = Hasher(share=1)  # one for all, as it keeps tables


def mark(tensor: Tensor, like: Sequence[Any] = ("",)) -> list[Any]:
    """A mark that reveals later writes to a tensor: its data type and a hash of its bits.

    Args:
        tensor: of any device and memory format.
        like: an earlier mark, of a tensor that may have been converted since.
    """
    dtype = getattr(torch, like[0]) if like[0] else tensor.dtype
    # In one memory format, as a hash depends on the order of memory.
    converted = tensor.detach().to(dtype).contiguous()
    (number,) = as_numbers(_MARKS.hashes([converted]))
    return [str(dtype).removeprefix("torch."), int(number)]

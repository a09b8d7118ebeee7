"""Packs lists of tensors into flat buffers, one for each data type, and unpacks them.

Messages carry no description of their content: sender and receiver list tensors of the same sizes in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

_PART_BYTES = 2**26  # packed at once of a whole model


def by_dtype(tensors: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Group tensors by data type."""
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    # Sorted, because a message's buffers are matched by position: both ends need the same order.
    return {dtype: groups[dtype] for dtype in sorted(groups, key=str)}


def in_parts(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of tensors of one data type, some at a time: to pack a whole model would take its memory twice."""
    for group in by_dtype(tensors).values():
        part: list[Tensor] = []
        for tensor in group:
            if part and packed_bytes([*part, tensor]) > _PART_BYTES:
                yield part
                part = []
            part.append(tensor)
        yield part


def flatten(tensors: Iterable[Tensor], device: torch.device | None = None) -> Tensor:
    """Concatenate tensors into one flat buffer, on ``device`` if given."""
    pieces = [tensor.detach().reshape(-1).to(device) for tensor in tensors]
    return torch.cat(pieces)


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat buffer into views with the shapes of ``like``."""
    sizes = [tensor.numel() for tensor in like]
    views = []
    for piece, tensor in zip(flat.split(sizes), like, strict=True):
        views.append(piece.view(tensor.shape))
    return views


def cut(sizes: Iterable[int], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut flat tensors that are laid end to end into pieces of ``length`` entries; the last one may be shorter.

    Yields:
        For each piece the parts of tensors in it: which tensor, its first entry, and the one after its last.
    """
    piece: list[tuple[int, int, int]] = []
    free = length
    for index, size in enumerate(sizes):
        first = 0
        while first < size:
            last = min(size, first + free)
            piece.append((index, first, last))
            free -= last - first
            first = last
            if not free:
                yield piece
                piece, free = [], length
    if piece:
        yield piece


def pack(tensors: Iterable[Tensor], device: torch.device) -> dict[torch.dtype, Tensor]:
    """Copy tensors into one flat buffer on ``device`` per data type."""
    return {dtype: flatten(group, device) for dtype, group in by_dtype(tensors).items()}


def empty_like_packed(tensors: Iterable[Tensor], device: torch.device) -> dict[torch.dtype, Tensor]:
    """Allocate the buffers that :func:`pack` would return; the tensors may be on the meta device."""
    flats = {}
    for dtype, group in by_dtype(tensors).items():
        entries = sum(tensor.numel() for tensor in group)
        flats[dtype] = torch.empty(entries, dtype=dtype, device=device)
    return flats


def unpack(flats: Mapping[torch.dtype, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Cut the buffers of :func:`pack` into views with the shapes of ``like``, in its order."""
    pieces = {}
    for dtype, group in by_dtype(like).items():
        pieces[dtype] = iter(split(flats[dtype], group))
    # Each data type's pieces are in the order of `like`.
    return [next(pieces[tensor.dtype]) for tensor in like]


def copy_into(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write each value into the tensor at its position."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.detach().copy_(value)


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Size of tensors in a message; they may be on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

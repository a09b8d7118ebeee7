"""Takes means over the workers: of flat buffers, and of received copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.packing import by_dtype, copy_into, flatten, split
from resist_lightning.comm.tensors import computable, sendable, summable


def start_mean(collective: Collective, flat: Tensor, kind: str, left_out: Sequence[int] = ()) -> Finish:
    """Start replacing ``flat`` by its mean over the workers; for integers and booleans, by the maximum.

    Collective: every worker must call this, in the same order, those that are left out too.

    Args:
        collective: the workers.
        flat: of the same size and data type on all workers.
        kind: how the bytes are counted.
        left_out: workers that get the mean, but whose own values do not count; not all of them.

    Returns:
        A function that waits for the mean.
    """
    numbers = summable(flat)
    if collective.worker in left_out:
        numbers.fill_(_neutral(numbers.dtype))
    finish_sum = collective.start_all_reduce(numbers, kind)

    def finish_mean() -> None:
        total = finish_sum()
        # Divided where it was summed up: a GPU rounds quotients differently from a CPU, and gloo serves both.
        _divide(total, collective.workers, left_out)
        if total is not numbers:
            numbers.copy_(total)
        _write_back(numbers, flat)

    return finish_mean


def mean_at_first(collective: Collective, flat: Tensor, kind: str, left_out: Sequence[int] = ()) -> None:
    """Replace worker 0's ``flat`` by the mean of :func:`start_mean`; the others send theirs, and keep it as it is.

    They send one after the other, so that worker 0 needs only one more buffer.

    Collective: every worker must call this, in the same order.
    """
    numbers = summable(flat) if collective.worker == 0 else flat
    if collective.worker == 0 and 0 in left_out:
        numbers.fill_(_neutral(numbers.dtype))
    for peer in range(1, collective.workers):
        if peer in left_out:
            continue
        arrived = torch.empty_like(flat) if collective.worker == 0 else flat
        send_to_first(collective, peer, [arrived], kind)
        if collective.worker > 0:
            continue
        values = summable(arrived)
        if numbers.is_floating_point():
            numbers.add_(values)
        else:
            numbers.copy_(torch.maximum(numbers, values))
    if collective.worker == 0:
        _divide(numbers, collective.workers, left_out)
        _write_back(numbers, flat)


def send_to_first(collective: Collective, peer: int, flats: Sequence[Tensor], kind: str) -> None:
    """Send flat buffers from one worker to worker 0, which receives into its own; all others' are left alone.

    Collective: every worker must call this, in the same order; only these two talk.

    Args:
        collective: the workers.
        peer: the sender.
        flats: on these two, of the same sizes and data types.
        kind: how the bytes are counted.
    """
    messages = list(map(sendable, flats))
    if collective.worker == 0:
        collective.exchange({}, {peer: messages}, {})
    elif collective.worker == peer:
        collective.exchange({0: messages}, {}, {kind: sum(flat.nbytes for flat in flats)})
    else:
        collective.exchange({}, {}, {})


def _divide(total: Tensor, workers: int, left_out: Sequence[int]) -> None:
    """Turn a sum over all workers but those left out into a mean; integers stay."""
    if total.is_floating_point():
        total.div_(workers)
        if left_out:
            total.mul_(workers / (workers - len(left_out)))


def mean_inside(collective: Collective, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over the members of this worker.

    Collective: every member must call this, in the same order.
    """
    if collective.members == 1:
        return
    for group in by_dtype(tensors).values():
        flat = flatten(group)
        collective.mean_inside(flat, "statistics")
        copy_into(group, split(flat, group))


def mean_into(own: Tensor, others: Sequence[Tensor]) -> None:
    """Replace ``own`` by the mean of it and ``others``; by the maximum for integers."""
    own = own.detach()
    numbers = summable(own)
    received = [summable(other.to(own.device)) for other in others]
    if numbers.is_floating_point():
        # The mean as an offset from the own value, so that values equal everywhere (frozen) stay as they are.
        offset = torch.stack([_difference(other, numbers) for other in received]).sum(0)
        numbers.add_(offset / (len(others) + 1))
    else:
        for other in received:
            numbers.copy_(torch.maximum(numbers, other))
    _write_back(numbers, own)


def keep_finite(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Finish:
    """Prepare for an average of tensors in which the sum of a mask may overflow; sends nothing.

    Returns:
        A function for after the average: it restores the finite values of masks where they have become infinite.
    """
    known = set(map(id, masks))
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors if id(tensor) in known]

    def restore() -> None:
        for tensor, before in kept:
            numbers, finite = computable(tensor.detach()), computable(before)
            overflowed = finite.isfinite() & ~numbers.isfinite()
            numbers.copy_(torch.where(overflowed, finite, numbers))
            _write_back(numbers, tensor)

    return restore


def move_by(own: Tensor, start: Tensor, end: Tensor) -> None:
    """Add to ``own`` the difference between ``start`` and ``end``; none of them of integers."""
    own = own.detach()
    numbers = summable(own)
    numbers.add_(_difference(summable(end), summable(start)))
    _write_back(numbers, own)


def _difference(end: Tensor, start: Tensor) -> Tensor:
    """``end - start``; 0 where they are equal, and infinite too, as in a mask of -inf."""
    return (end - start).masked_fill_(end == start, 0)


def _write_back(numbers: Tensor, tensor: Tensor) -> None:
    """Write the :func:`summable` numbers of a tensor into it, where they are a wider copy and no view."""
    own = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if numbers.dtype != own.dtype:
        own.copy_(numbers)


def _neutral(dtype: torch.dtype) -> int:
    """The neutral element of the all-reduce: adds nothing to a sum, and is never above a maximum."""
    if dtype.is_floating_point or dtype == torch.bool:
        return 0
    return torch.iinfo(dtype).min

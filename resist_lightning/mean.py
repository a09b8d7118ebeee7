"""The mean over those workers that count: of flat buffers, and of a tensor of which there are copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resist_lightning.tensors import computable
from resist_lightning.verbs import Collective, Finish


def start_mean(collective: Collective, flat: Tensor, kind: str, left_out: Sequence[int] = ()) -> Finish:
    """Begin to replace ``flat`` by its mean over the workers; for integers and booleans, by the maximum.

    Collective: every worker must call this, in the same order, those that are left out too.

    Args:
        collective: the workers.
        flat: of the same size and data type on all workers.
        kind: how the bytes are counted.
        left_out: workers that get the mean, but whose own values do not count; not all of them.

    Returns:
        A function that waits for it.
    """
    numbers = computable(flat)
    if collective.worker in left_out:
        numbers.fill_(_least(numbers.dtype))
    finish = collective.start_mean(numbers, kind)

    def finish_mean() -> None:
        finish()
        if left_out and numbers.is_floating_point():
            numbers.mul_(collective.workers / (collective.workers - len(left_out)))
        if numbers.dtype != flat.dtype and not flat.is_complex():
            flat.copy_(numbers)

    return finish_mean


def mean_into(own: Tensor, others: Sequence[Tensor]) -> None:
    """Replace ``own`` by the mean of it and ``others``; by the maximum for integers."""
    own = own.detach()
    numbers = computable(own)
    received = [computable(other.to(own.device)) for other in others]
    if numbers.is_floating_point():
        # The mean as an offset from the own value, so that what is equal everywhere (frozen) stays as it is.
        offset = torch.stack([other - numbers for other in received]).sum(0)
        numbers.add_(offset / (len(others) + 1))
    else:
        for other in received:
            numbers.copy_(torch.maximum(numbers, other))
    if numbers.dtype != own.dtype and not own.is_complex():
        own.copy_(numbers)


def _least(dtype: torch.dtype) -> int:
    """What adds nothing to a sum, and is no maximum."""
    return 0 if dtype.is_floating_point or dtype == torch.bool else torch.iinfo(dtype).min

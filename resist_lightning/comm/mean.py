"""Takes all means over the workers: of flat buffers, of received copies, and of compressed changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.packing import by_dtype, copy_into, flatten, split
from resist_lightning.comm.quantize import Quantizer, arrange
from resist_lightning.comm.tensors import summable


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
    numbers = summable(flat)
    if collective.worker in left_out:
        numbers.fill_(_neutral(numbers.dtype))
    finish_sum = collective.start_all_reduce(numbers, kind)

    def finish_mean() -> None:
        total = finish_sum()
        if total.is_floating_point():
            # Divided where it was summed up: a GPU rounds quotients otherwise than a CPU, and gloo serves both.
            total.div_(collective.workers)
            if left_out:
                total.mul_(collective.workers / (collective.workers - len(left_out)))
        if total is not numbers:
            numbers.copy_(total)
        _write_back(numbers, flat)

    return finish_mean


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
        # The mean as an offset from the own value, so that what is equal everywhere (frozen) stays as it is.
        offset = torch.stack([other - numbers for other in received]).sum(0)
        numbers.add_(offset / (len(others) + 1))
    else:
        for other in received:
            numbers.copy_(torch.maximum(numbers, other))
    _write_back(numbers, own)


def move_by(own: Tensor, start: Tensor, end: Tensor) -> None:
    """Add to ``own`` the difference between ``start`` and ``end``; none of them of integers."""
    own = own.detach()
    numbers = summable(own)
    numbers.add_(summable(end) - summable(start))
    _write_back(numbers, own)


def _write_back(numbers: Tensor, tensor: Tensor) -> None:
    """Write the :func:`summable` numbers of a tensor into it, where they are a wider copy and no view."""
    own = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if numbers.dtype != own.dtype:
        own.copy_(numbers)


def _neutral(dtype: torch.dtype) -> int:
    """The number that neither adds to a sum nor is a maximum."""
    if dtype.is_floating_point or dtype == torch.bool:
        return 0
    return torch.iinfo(dtype).min


class CompressedMean:
    """Tensors that are equal on all workers when a round begins, and become the mean of the workers' when it ends.

    Every worker averages an equal share of the entries for all: first each sends the others their shares of its
    change, then each sends the mean of its own share to all. What is applied is what was sent, so that all workers end
    with the same, bit for bit.
    """

    def __init__(self, collective: Collective, wire: Quantizer) -> None:
        self._collective = collective
        self._wire = wire
        self._before: dict[int, Tensor] = {}

    def begin(self, tensors: Iterable[Tensor], copies: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        """Remember tensors that are equal on all workers now; it costs a copy of them.

        Args:
            tensors: of the module.
            copies: by identity, what to remember in the place of a copy.
        """
        self._before = {}  # never two copies at once
        for tensor in tensors:
            key = id(tensor)
            self._before[key] = copies[key] if key in copies else tensor.detach().clone()

    def load(self, before: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Remember of some tensors, and of no others, what they were when the round began."""
        self._before = {id(tensor): value.to(tensor.device, copy=True) for tensor, value in before}

    def before(self, tensor: Tensor) -> Tensor | None:
        """What a tensor was when the round began, if it was remembered."""
        return self._before.get(id(tensor))

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor was remembered."""
        return id(tensor) in self._before

    def average(
        self,
        tensors: Sequence[Tensor],
        kind: str,
        left_out: Sequence[int] = (),
        copies: Sequence[Tensor] | None = None,
    ) -> None:
        """Replace tensors that :meth:`begin` was given by what they were plus the mean change.

        Collective: every worker must call this, in the same order, with the same tensors.

        Args:
            tensors: of the module.
            kind: how the bytes are counted.
            left_out: workers that take part, but whose changes do not count.
            copies: of the tensors, which are averaged in their place.
        """
        values = arrange(tensors if copies is None else copies)
        tensors = arrange(tensors)
        workers = self._collective.workers
        if not tensors or workers == 1:
            return
        pairs = list(zip(tensors, values, strict=True))
        change = flatten(value.detach() - self._before[id(tensor)] for tensor, value in pairs)
        if self._collective.worker in left_out:
            change.zero_()
        mean = self._mean(change, kind, workers - len(left_out))
        for (tensor, value), piece in zip(pairs, split(mean, tensors), strict=True):
            old = self._before[id(tensor)]
            value.detach().copy_(old + piece.to(old.dtype))

    def _mean(self, change: Tensor, kind: str, counted: int) -> Tensor:
        """The sum of all workers' changes divided by how many count, as float32."""
        form = self._wire.format
        me, workers = self._collective.worker, self._collective.workers
        peers = [worker for worker in range(workers) if worker != me]
        message = self._wire.encode(change).view(-1, form.group_bytes)
        # Shares are whole groups, so that a group's scale always travels with its entries.
        shares = [slice(*form.share(len(change), worker, workers)) for worker in range(workers)]

        # First the others' shares to them, and their parts of the own share here.
        own_part = message[shares[me]].view(-1)
        sends = {peer: message[shares[peer]].view(-1) for peer in peers}
        parts = {peer: torch.empty_like(own_part) for peer in peers}
        self._exchange(sends, parts, kind)
        parts[me] = own_part
        # In the order of workers, so that the sum does not depend on whose share it is.
        total = self._decode(parts[0])
        for worker in range(1, workers):
            total = total + self._decode(parts[worker])

        # Then the mean of the own share to all, and the others' means here.
        result = torch.empty_like(message)
        means = {worker: result[shares[worker]].view(-1) for worker in range(workers)}
        own_mean = means.pop(me)
        own_mean.copy_(self._wire.encode(total / counted))
        self._exchange(dict.fromkeys(peers, own_mean), means, kind)
        # This worker decodes its own mean as well: all apply what was sent, rounding included.
        return self._wire.decode(result.view(-1), len(change))

    def _decode(self, part: Tensor) -> Tensor:
        form = self._wire.format
        groups = part.numel() // form.group_bytes
        return self._wire.decode(part, groups * form.group)

    def _exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor], kind: str) -> None:
        """Send what is not empty, receive what is not empty."""
        outgoing = {peer: [flat] for peer, flat in sends.items() if len(flat)}
        incoming = {peer: [flat] for peer, flat in receives.items() if len(flat)}
        sent_bytes = sum(flat.nbytes for (flat,) in outgoing.values())
        self._collective.exchange(outgoing, incoming, {kind: sent_bytes})

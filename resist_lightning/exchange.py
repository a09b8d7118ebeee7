"""Executes the plan of a sync: packs tensors into flat buffers, sends them, and puts them in place.

One flat buffer per pair of workers and data type, so messages are O(workers), not O(tensors).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_lightning.collective import Collective
from resist_lightning.plan import SyncPlan, Transfer


@dataclass(frozen=True)
class Cargo:
    """What travels of a block. Tensors of an absent block are on the meta device: a shape and a data type.

    Args:
        block: its parameters and buffers.
        state: its optimizer state, if that travels.
    """

    block: Sequence[Tensor]
    state: Sequence[Tensor] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, in the order of travel."""
        return [*self.block, *self.state]


@dataclass(frozen=True)
class Kinds:
    """Under which kind the bytes are counted."""

    shared: str = "shared"
    merge: str = "merge"
    hand_over: str = "hand_over"
    state: str = "state"

    @classmethod
    def all(cls, kind: str) -> Kinds:
        """Everything under one kind."""
        return cls(kind, kind, kind, kind)


class Exchange:
    """The worker's side of a sync.

    Args:
        collective: the workers.
        device: where the tensors of present blocks live.
    """

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self._collective = collective
        self._device = device

    def average(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Replace tensors by their mean over all workers (integers: the maximum); one all-reduce per data type.

        Collective: every worker must call this, in the same order, with tensors of the same shapes.
        """
        for dtype, flat in self._pack(tensors).items():
            self._collective.mean_(flat, kind)
            _copy_into([tensor for tensor in tensors if tensor.dtype == dtype], flat)

    def broadcast(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Replace tensors by worker 0's. Collective: every worker must call this, in the same order."""
        for dtype, flat in self._pack(tensors).items():
            self._collective.broadcast_(flat, kind)
            _copy_into([tensor for tensor in tensors if tensor.dtype == dtype], flat)

    def merge(self, plan: SyncPlan, cargo: Callable[[int], Cargo], kinds: Kinds) -> None:
        """Give every block that several workers held its mean over them, at its owner.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.
        """
        received = self._transfer(plan.merge, cargo, kinds.merge, kinds.state)
        copies: dict[int, list[list[Tensor]]] = defaultdict(list)
        for transfer, tensors in received.items():
            copies[transfer.block].append(tensors)
        for block, others in copies.items():
            for own, values in zip(cargo(block).tensors, zip(*others, strict=True), strict=True):
                _mean_into(own, values)

    def hand_over(
        self, plan: SyncPlan, cargo: Callable[[int], Cargo], kinds: Kinds, make_room: Callable[[], None]
    ) -> None:
        """Send every block from its owner to its next holders, and put what arrives in place.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.

        Args:
            plan: the plan of the sync.
            cargo: what travels of a block.
            kinds: how to count the bytes.
            make_room: called when all has been sent and received, to free blocks that leave and allocate those that
                arrive.
        """
        received = self._transfer(plan.hand_over, cargo, kinds.hand_over, kinds.state)
        make_room()
        for transfer, tensors in received.items():
            for own, value in zip(cargo(transfer.block).tensors, tensors, strict=True):
                own.detach().copy_(value)

    def _transfer(
        self, transfers: Sequence[Transfer], cargo: Callable[[int], Cargo], kind: str, state_kind: str
    ) -> dict[Transfer, list[Tensor]]:
        """Send and receive at once. Returns the received tensors (views of flat buffers) by transfer."""
        me = self._collective.worker
        outgoing: dict[int, list[Tensor]] = defaultdict(list)
        expected: dict[int, list[Transfer]] = defaultdict(list)
        kinds: Counter[str] = Counter()
        for transfer in transfers:
            if transfer.source == me:
                load = cargo(transfer.block)
                outgoing[transfer.target].extend(load.tensors)
                kinds[kind] += _bytes(load.block)
                kinds[state_kind] += _bytes(load.state)
            elif transfer.target == me:
                expected[transfer.source].append(transfer)
        sends = {peer: list(self._pack(tensors).values()) for peer, tensors in outgoing.items()}
        loads = {peer: [cargo(transfer.block).tensors for transfer in batch] for peer, batch in expected.items()}
        buffers = {peer: self._empty([tensor for load in batch for tensor in load]) for peer, batch in loads.items()}
        self._collective.exchange(sends, {peer: list(flats.values()) for peer, flats in buffers.items()}, kinds)
        received: dict[Transfer, list[Tensor]] = {}
        for peer, flats in buffers.items():
            offsets: Counter[torch.dtype] = Counter()
            for transfer, tensors in zip(expected[peer], loads[peer], strict=True):
                received[transfer] = [_take(flats, offsets, tensor) for tensor in tensors]
        return received

    def _pack(self, tensors: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            groups[tensor.dtype].append(tensor.detach().reshape(-1).to(self._device))
        return {dtype: torch.cat(groups[dtype]) for dtype in sorted(groups, key=str)}

    def _empty(self, tensors: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
        sizes: Counter[torch.dtype] = Counter()
        for tensor in tensors:
            sizes[tensor.dtype] += tensor.numel()
        return {dtype: torch.empty(sizes[dtype], dtype=dtype, device=self._device) for dtype in sorted(sizes, key=str)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _take(flats: Mapping[torch.dtype, Tensor], offsets: Counter[torch.dtype], like: Tensor) -> Tensor:
    """The next piece of a flat buffer, in the shape of ``like``."""
    start = offsets[like.dtype]
    offsets[like.dtype] += like.numel()
    return flats[like.dtype][start : start + like.numel()].view(like.shape)


def _copy_into(tensors: Iterable[Tensor], flat: Tensor) -> None:
    offset = 0
    for tensor in tensors:
        tensor.detach().copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
        offset += tensor.numel()


def _mean_into(own: Tensor, others: Sequence[Tensor]) -> None:
    """Replace ``own`` by the mean of it and ``others``; by the maximum for integers."""
    own = own.detach()
    if own.is_floating_point():
        # The mean as an offset from the own value, so that what is equal everywhere (frozen) stays as it is.
        offset = torch.stack([other.to(own.device) - own for other in others]).sum(0)
        own.add_(offset / (len(others) + 1))
    else:
        for other in others:
            own.copy_(torch.maximum(own, other.to(own.device)))

"""Executes the plan of a sync: packs tensors into flat buffers, sends them, and puts them in place.

One flat buffer per pair of workers and data type, so messages are O(workers), not O(tensors).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist_lightning.comm.bucket import Bucket, make_buckets
from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.mean import mean_into, start_mean
from resist_lightning.comm.quantize import Quantizer, arrange, flatten, split
from resist_lightning.comm.tensors import all_sendable, sendable
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.schedule.transfers import SyncPlan, Transfer


@dataclass(frozen=True)
class Payload:
    """What travels of a block. Tensors of an absent block are on the meta device: a shape and a data type.

    Args:
        block: its parameters and buffers, but for those that are compressed.
        state: its optimizer state, if that travels.
        compressed: parameters that travel in fewer bits.
        noise: random numbers for rounding these.
    """

    block: Sequence[Tensor]
    state: Sequence[Tensor] = ()
    compressed: Sequence[Tensor] = ()
    noise: torch.Generator | None = None

    @property
    def plain(self) -> list[Tensor]:
        """What travels as it is, in the order of travel."""
        return [*self.block, *self.state]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, in the order of travel."""
        return [*self.plain, *arrange(self.compressed)]

    @property
    def entries(self) -> int:
        """Numbers that travel in fewer bits."""
        return sum(tensor.numel() for tensor in self.compressed)


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
        wire: how compressed payload is sent; needed only if there is any.
        module: the user's, whose unit vectors have unit length after an average too.
    """

    def __init__(
        self,
        collective: Collective,
        device: torch.device,
        wire: Quantizer | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self._module = module
        self.worker = collective.worker
        self._collective = collective
        self._device = device
        self._wire = wire
        self._buckets: dict[torch.dtype, Bucket] = {}

    def put_together(self, tensors: Iterable[Tensor]) -> None:
        """Move tensors that will be averaged together again and again into one buffer per data type. Sends nothing."""
        self._buckets = make_buckets(tensors, self._device)

    def take_apart(self) -> None:
        """Give the tensors of :meth:`put_together` memory of their own again."""
        for bucket in self._buckets.values():
            bucket.dissolve()
        self._buckets = {}

    def average(self, tensors: Sequence[Tensor], kind: str, left_out: Sequence[int] = ()) -> None:
        """:meth:`start_average`, and wait. Collective: every worker must call this, in the same order."""
        self.start_average(tensors, kind, left_out)()

    def start_average(self, tensors: Sequence[Tensor], kind: str, left_out: Sequence[int] = ()) -> Finish:
        """Begin to replace tensors by their mean over all workers (integers: the maximum).

        One all-reduce per data type. Collective: every worker must call this, in the same order, with tensors of the
        same shapes.

        Args:
            tensors: this worker's.
            kind: how the bytes are counted.
            left_out: workers that take part, but whose values do not count.

        Returns:
            A function that waits for what was begun.
        """
        begun: list[Finish] = []
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            bucket = self._buckets.get(dtype)
            if bucket is not None and bucket.holds(group):
                begun.append(start_mean(self._collective, bucket.flat, kind, left_out))
            else:  # not left under way: it has a buffer of its own, and a hand-over would need another one beside it
                (flat,) = self._pack(group).values()
                start_mean(self._collective, flat, kind, left_out)()
                _copy_into(group, flat)

        def finish() -> None:
            for step in begun:
                step()
            self._normalise(tensors)

        return finish

    def broadcast(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Replace tensors by worker 0's. Collective: every worker must call this, in the same order."""
        for dtype, flat in self._pack(tensors).items():
            self._collective.broadcast_(sendable(flat), kind)
            _copy_into([tensor for tensor in tensors if tensor.dtype == dtype], flat)

    def merge(self, plan: SyncPlan, payload: Callable[[int], Payload], kinds: Kinds) -> None:
        """Give every block that several workers held its mean over them, at its owner.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.
        """
        received, _ = self._transfer(plan.merge, payload, kinds.merge, kinds.state)
        copies: dict[int, list[list[Tensor]]] = defaultdict(list)
        for transfer, tensors in received.items():
            copies[transfer.block].append(tensors)
        for block, others in copies.items():
            for own, values in zip(payload(block).tensors, zip(*others, strict=True), strict=True):
                mean_into(own, values)
            self._normalise(payload(block).tensors)

    def hand_over(
        self, plan: SyncPlan, payload: Callable[[int], Payload], kinds: Kinds, make_room: Callable[[], None]
    ) -> None:
        """Send every block from its owner to its next holders, and put what arrives in place.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.

        Args:
            plan: the plan of the sync.
            payload: what travels of a block.
            kinds: how to count the bytes.
            make_room: called when all has been sent and received, to free blocks that leave and allocate those that
                arrive.
        """
        received, sent = self._transfer(plan.hand_over, payload, kinds.hand_over, kinds.state)
        make_room()
        for transfer, tensors in received.items():
            _put(payload(transfer.block).tensors, tensors)
        for block, message in sent.items():  # an owner that stays a holder has what the other holders have
            load = payload(block)
            if load.compressed and not load.compressed[0].is_meta:
                _put(arrange(load.compressed), self._decompressed(message, load))

    def _normalise(self, averaged: Iterable[Tensor]) -> None:
        if self._module is None or self._collective.workers == 1:
            return
        vectors = {id(vector) for vector in unit_vectors(self._module).values()}
        normalise(tensor for tensor in averaged if id(tensor) in vectors)

    def _transfer(
        self, transfers: Sequence[Transfer], payload: Callable[[int], Payload], kind: str, state_kind: str
    ) -> tuple[dict[Transfer, list[Tensor]], dict[int, Tensor]]:
        """Send and receive at once.

        Returns:
            The received tensors by transfer, and the compressed messages that were sent by block.
        """
        me = self._collective.worker
        outgoing: dict[int, list[Transfer]] = defaultdict(list)
        expected: dict[int, list[Transfer]] = defaultdict(list)
        for transfer in transfers:
            if transfer.source == me:
                outgoing[transfer.target].append(transfer)
            elif transfer.target == me:
                expected[transfer.source].append(transfer)
        loads = {t.block: payload(t.block) for t in transfers if me in (t.source, t.target)}
        messages = {block: self._compressed(loads[block]) for block in {t.block for t in transfers if t.source == me}}
        kinds: Counter[str] = Counter()
        for transfer in (transfer for batch in outgoing.values() for transfer in batch):
            kinds[kind] += _bytes([*loads[transfer.block].block, messages[transfer.block]])
            kinds[state_kind] += _bytes(loads[transfer.block].state)
        sends = {peer: self._message(batch, loads, messages) for peer, batch in outgoing.items()}
        receives = {peer: self._empty_message(batch, loads) for peer, batch in expected.items()}
        landing = {peer: flats.values() for peer, flats in receives.items()}
        self._collective.exchange(all_sendable(sends), all_sendable(landing), kinds)
        received: dict[Transfer, list[Tensor]] = {}
        for peer, flats in receives.items():
            received.update(self._unpack(expected[peer], loads, flats))
        return received, {block: message for block, message in messages.items() if len(message)}

    def _message(
        self, batch: Sequence[Transfer], loads: Mapping[int, Payload], messages: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """One flat buffer per data type, and one for what is compressed."""
        plain = self._pack(tensor for transfer in batch for tensor in loads[transfer.block].plain)
        compressed = torch.cat([messages[transfer.block] for transfer in batch])
        return [*plain.values(), compressed] if len(compressed) else list(plain.values())

    def _empty_message(
        self, batch: Sequence[Transfer], loads: Mapping[int, Payload]
    ) -> dict[torch.dtype | None, Tensor]:
        """Room for what :meth:`_message` makes; under None what is compressed."""
        plain = self._empty(tensor for transfer in batch for tensor in loads[transfer.block].plain)
        compressed = sum(self._compressed_bytes(loads[transfer.block]) for transfer in batch)
        if compressed:
            plain[None] = torch.empty(compressed, dtype=torch.uint8, device=self._device)
        return plain

    def _unpack(
        self, batch: Sequence[Transfer], loads: Mapping[int, Payload], flats: Mapping[torch.dtype | None, Tensor]
    ) -> dict[Transfer, list[Tensor]]:
        """What arrived from one worker, in the shapes of the payload; what was plain are views."""
        offsets: Counter[torch.dtype] = Counter()
        start = 0
        received: dict[Transfer, list[Tensor]] = {}
        for transfer in batch:
            load = loads[transfer.block]
            received[transfer] = [_take(flats[tensor.dtype], offsets, tensor) for tensor in load.plain]
            end = start + self._compressed_bytes(load)
            if end > start:
                received[transfer] += self._decompressed(flats[None][start:end], load)
            start = end
        return received

    def _compressed(self, load: Payload) -> Tensor:
        if self._wire is None or not load.compressed:
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        return self._wire.encode(flatten(arrange(load.compressed)), load.noise)

    def _compressed_bytes(self, load: Payload) -> int:
        return self._wire.format.bytes(load.entries) if self._wire is not None else 0

    def _decompressed(self, message: Tensor, load: Payload) -> list[Tensor]:
        assert self._wire is not None
        return split(self._wire.decode(message, load.entries), arrange(load.compressed))

    def _pack(self, tensors: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            groups[tensor.dtype].append(tensor.detach().reshape(-1).to(self._device))
        return {dtype: torch.cat(groups[dtype]) for dtype in sorted(groups, key=str)}

    def _empty(self, tensors: Iterable[Tensor]) -> dict[torch.dtype | None, Tensor]:
        sizes: Counter[torch.dtype] = Counter()
        for tensor in tensors:
            sizes[tensor.dtype] += tensor.numel()
        return {dtype: torch.empty(sizes[dtype], dtype=dtype, device=self._device) for dtype in sorted(sizes, key=str)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _take(flat: Tensor, offsets: Counter[torch.dtype], like: Tensor) -> Tensor:
    """The next piece of a flat buffer, in the shape of ``like``."""
    start = offsets[like.dtype]
    offsets[like.dtype] += like.numel()
    return flat[start : start + like.numel()].view(like.shape)


def _put(own: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(own, values, strict=True):
        tensor.detach().copy_(value)


def _copy_into(tensors: Iterable[Tensor], flat: Tensor) -> None:
    offset = 0
    for tensor in tensors:
        tensor.detach().copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
        offset += tensor.numel()

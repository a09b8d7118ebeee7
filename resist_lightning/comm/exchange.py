"""Executes the plan of a sync: averages, merges and hands over blocks in flat buffers.

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
from resist_lightning.comm.packing import (
    by_dtype,
    copy_into,
    empty_like_packed,
    flatten,
    pack,
    packed_bytes,
    split,
    unpack,
)
from resist_lightning.comm.quantize import Quantizer, arrange
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
        """Start replacing tensors by their mean over all workers (integers: the maximum).

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
        for dtype, group in by_dtype(tensors).items():
            bucket = self._buckets.get(dtype)
            if bucket is not None and bucket.holds(group):
                begun.append(start_mean(self._collective, bucket.flat, kind, left_out))
            else:
                # Awaited at once: its buffer would otherwise stay allocated beside those of a hand-over.
                flat = flatten(group, self._device)
                start_mean(self._collective, flat, kind, left_out)()
                copy_into(group, split(flat, group))

        def finish() -> None:
            for step in begun:
                step()
            self._normalise(tensors)

        return finish

    def broadcast(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Replace tensors by worker 0's. Collective: every worker must call this, in the same order."""
        flats = pack(tensors, self._device)
        for flat in flats.values():
            self._collective.broadcast_(sendable(flat), kind)
        copy_into(tensors, unpack(flats, tensors))

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
            copy_into(payload(transfer.block).tensors, tensors)
        for block, message in sent.items():
            load = payload(block)
            # An owner that stays a holder takes the rounded values it has sent, so that all holders are equal.
            if load.compressed and not load.compressed[0].is_meta:
                copy_into(arrange(load.compressed), self._decompressed(message, load))

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
        # Compressed once per block, not per target: all targets must receive the same rounding.
        messages = {block: self._compressed(loads[block]) for block in {t.block for t in transfers if t.source == me}}
        kinds: Counter[str] = Counter()
        for transfer in transfers:
            if transfer.source == me:
                load = loads[transfer.block]
                kinds[kind] += packed_bytes([*load.block, messages[transfer.block]])
                kinds[state_kind] += packed_bytes(load.state)
        sends = {peer: self._message(batch, loads, messages) for peer, batch in outgoing.items()}
        receives = {peer: self._empty_message(batch, loads) for peer, batch in expected.items()}
        self._collective.exchange(all_sendable(sends), all_sendable(receives), kinds)
        received: dict[Transfer, list[Tensor]] = {}
        for peer, flats in receives.items():
            received.update(self._unpack(expected[peer], loads, flats))
        return received, {block: message for block, message in messages.items() if len(message)}

    def _message(
        self, batch: Sequence[Transfer], loads: Mapping[int, Payload], messages: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """The buffers for one peer: one per data type, then one with everything that is compressed."""
        plain = [tensor for transfer in batch for tensor in loads[transfer.block].plain]
        flats = list(pack(plain, self._device).values())
        compressed = torch.cat([messages[transfer.block] for transfer in batch])
        # An empty buffer is not sent: it would be a message of its own.
        return [*flats, compressed] if len(compressed) else flats

    def _empty_message(self, batch: Sequence[Transfer], loads: Mapping[int, Payload]) -> list[Tensor]:
        """Allocates the buffers that :meth:`_message` of the sender returns."""
        plain = [tensor for transfer in batch for tensor in loads[transfer.block].plain]
        flats = list(empty_like_packed(plain, self._device).values())
        compressed = sum(self._compressed_bytes(loads[transfer.block]) for transfer in batch)
        if compressed:
            flats.append(torch.empty(compressed, dtype=torch.uint8, device=self._device))
        return flats

    def _unpack(
        self, batch: Sequence[Transfer], loads: Mapping[int, Payload], flats: Sequence[Tensor]
    ) -> dict[Transfer, list[Tensor]]:
        """The tensors of one peer's message by transfer; those that were not compressed are views."""
        plain = [tensor for transfer in batch for tensor in loads[transfer.block].plain]
        types = list(by_dtype(plain))
        views = iter(unpack(dict(zip(types, flats, strict=False)), plain))
        compressed = flats[-1] if len(flats) > len(types) else None
        start = 0
        received: dict[Transfer, list[Tensor]] = {}
        for transfer in batch:
            load = loads[transfer.block]
            received[transfer] = [next(views) for _ in load.plain]
            end = start + self._compressed_bytes(load)
            if compressed is not None and end > start:
                received[transfer] += self._decompressed(compressed[start:end], load)
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

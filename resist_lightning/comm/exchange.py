"""Executes the plan of a sync: averages, merges and hands over blocks in flat buffers.

One flat buffer per pair of workers and data type, so messages are O(workers), not O(tensors).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from resist_lightning.comm.bucket import Bucket, make_buckets
from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.mean import keep_finite, mean_at_first, mean_into, start_mean
from resist_lightning.comm.packing import (
    by_dtype,
    copy_into,
    empty_like_packed,
    flatten,
    in_parts,
    pack,
    packed_bytes,
    split,
    unpack,
)
from resist_lightning.comm.payload import Payload
from resist_lightning.comm.quantize import Quantizer, arrange
from resist_lightning.comm.tensors import all_sendable, sendable
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.schedule.transfers import SyncPlan, Transfer


class Exchange:
    """Packs tensors into flat buffers, and averages, merges and hands them over.

    Args:
        collective: the workers.
        device: where the tensors of present blocks live.
        wire: quantizer of compressed payload; needed only if there is any.
        module: the user's, whose unit vectors are normalised after an average.
    """

    def __init__(
        self,
        collective: Collective,
        device: torch.device,
        wire: Quantizer | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self._module = module
        self.collective = collective
        self.device = device
        self._wire = wire
        self._buckets: list[Bucket] = []
        self.masks: list[Tensor] = []  # their sum may overflow; where it does, an average leaves them as they are

    def put_together(self, groups: Iterable[Iterable[Tensor]]) -> None:
        """Move tensors that are averaged together repeatedly into one buffer per group and data type.

        Sends nothing.
        """
        self._buckets = []  # those of an earlier call are freed first
        for group in groups:
            self._buckets += make_buckets(group, self.device).values()

    def take_apart(self) -> None:
        """Give the tensors of :meth:`put_together` their own memory again."""
        for bucket in self._buckets:
            bucket.dissolve()
        self._buckets = []

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
            A function that waits for the averages.
        """
        begun: list[Finish] = []
        restore_masks = keep_finite(tensors, self.masks)
        for group in by_dtype(tensors).values():
            bucket = self._bucket_of(group)
            if bucket is not None:
                bucket.collect()
                begun += [start_mean(self.collective, bucket.flat, kind, left_out), bucket.spread]
            else:
                # Awaited at once: its buffer would otherwise stay allocated beside those of a hand-over.
                flat = flatten(group, self.device)
                start_mean(self.collective, flat, kind, left_out)()
                copy_into(group, split(flat, group))

        def finish() -> None:
            for step in begun:
                step()
            restore_masks()
            self.normalise(tensors)

        return finish

    def _bucket_of(self, tensors: Sequence[Tensor]) -> Bucket | None:
        """The buffer that has exactly these tensors, if there is one."""
        return next((bucket for bucket in self._buckets if bucket.holds(tensors)), None)

    def average_at_first(self, tensors: Sequence[Tensor], kind: str, left_out: Sequence[int] = ()) -> None:
        """:meth:`average` on worker 0; on the others the tensors stay as they are.

        Collective: every worker must call this, in the same order, with tensors of the same shapes.
        """
        first = self.collective.worker == 0
        restore_masks = keep_finite(tensors, self.masks)
        for group in by_dtype(tensors).values():
            bucket = self._bucket_of(group)
            if bucket is not None:
                bucket.collect()
            flat = bucket.flat if bucket is not None else flatten(group, self.device)
            mean_at_first(self.collective, flat, kind, left_out)
            if first and bucket is not None:
                bucket.spread()
            elif first:
                copy_into(group, split(flat, group))
        if first:
            restore_masks()
            self.normalise(tensors)

    def broadcast(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Replace tensors by worker 0's. Collective: every worker must call this, in the same order."""
        for part in in_parts(tensors):
            flat = flatten(part, self.device)
            self.collective.broadcast_(sendable(flat), kind)
            copy_into(part, split(flat, part))

    def make_members_alike(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Give the members of this worker the first one's values: before the training they may differ.

        Collective: every member must call this, in the same order.
        """
        if self.collective.members == 1:
            return
        for part in in_parts(tensors):
            flat = flatten(part)
            self.collective.broadcast_inside(flat, kind)
            copy_into(part, split(flat, part))

    def merge(self, plan: SyncPlan, payload_of: Callable[[int], Payload], kind: str = "") -> None:
        """Replace every block that several workers held by its mean over them, at its owner.

        ``kind`` is the kind of all bytes; "" counts them as ``merge``, and optimizer state as ``state``.
        Collective: every worker must call this, in the same order; only pairs with a transfer talk.
        """
        copies: dict[int, list[list[Tensor]]] = defaultdict(list)
        for block, tensors in self._transfer(plan.merge, payload_of, kind or "merge", kind or "state")[0]:
            copies[block].append(tensors)
        merged: list[Tensor] = []
        # When all copies of a block have arrived: a mean of means would be another number.
        for block, others in copies.items():
            own = payload_of(block).tensors
            for tensor, values in zip(own, zip(*others, strict=True), strict=True):
                mean_into(tensor, values)
            merged += own
        self.normalise(merged)  # once: it searches the whole module for unit vectors

    def hand_over(
        self, plan: SyncPlan, payload_of: Callable[[int], Payload], make_room: Callable[[], None], kind: str = ""
    ) -> None:
        """Send every block from its owner to its next holders, and copy arriving blocks into place.

        ``make_room`` is called when all messages are sent and received, to free blocks that leave and allocate those
        that arrive. ``kind`` is as for :meth:`merge`.

        Collective: every worker must call this, in the same order; only pairs with a transfer talk.
        """
        received, sent = self._transfer(plan.hand_over, payload_of, kind or "hand_over", kind or "state")
        make_room()
        # Payloads are requested again: before, tensors of arriving blocks were on the meta device.
        for block, tensors in received:
            copy_into(payload_of(block).tensors, tensors)
        for block, message in sent.items():
            payload = payload_of(block)
            # An owner that stays a holder takes the rounded values it has sent, so that all holders are equal.
            if payload.compressed and not payload.compressed[0].is_meta:
                copy_into(arrange(payload.compressed), self._decompressed(message, payload))

    def normalise(self, averaged: Iterable[Tensor]) -> None:
        """Scale unit vectors back to length 1: their mean is shorter."""
        if self._module is None or self.collective.workers == 1:
            return
        vectors = {id(vector) for vector in unit_vectors(self._module).values()}
        normalise(tensor for tensor in averaged if id(tensor) in vectors)

    def _transfer(
        self, transfers: Sequence[Transfer], payload_of: Callable[[int], Payload], kind: str, state_kind: str
    ) -> tuple[list[tuple[int, list[Tensor]]], dict[int, Tensor]]:
        """Send and receive all transfers at once.

        Returns:
            Received blocks with their tensors; and the compressed messages that were sent, by block.
        """
        me = self.collective.worker
        payloads: dict[int, Payload] = {}
        messages: dict[int, Tensor] = {}
        outgoing: dict[int, list[int]] = defaultdict(list)
        expected: dict[int, list[int]] = defaultdict(list)
        kinds: Counter[str] = Counter()
        for source, target, block in transfers:
            if me not in (source, target):
                continue
            if block not in payloads:
                payloads[block] = payload_of(block)
            if target == me:
                expected[source].append(block)
                continue
            outgoing[target].append(block)
            # Compressed once per block, not per target: all targets must receive the same rounding.
            if block not in messages:
                messages[block] = self._compressed(payloads[block])
            # Counted by purpose here; the collective sees flat buffers only.
            kinds[payloads[block].kind or kind] += packed_bytes([*payloads[block].block, messages[block]])
            kinds[state_kind] += packed_bytes(payloads[block].state)

        sends: dict[int, list[Tensor]] = {}
        # An evaluation sends the same blocks to all others, so they are packed once.
        packed: dict[tuple[int, ...], list[Tensor]] = {}
        for peer, blocks in outgoing.items():
            if tuple(blocks) not in packed:
                compressed = [messages[block] for block in blocks]
                packed[tuple(blocks)] = self._message([payloads[block] for block in blocks], compressed)
            sends[peer] = packed[tuple(blocks)]
        receives: dict[int, list[Tensor]] = {}
        for peer, blocks in expected.items():
            receives[peer] = self._empty_message([payloads[block] for block in blocks])
        self.collective.exchange(all_sendable(sends), all_sendable(receives), kinds)

        received: list[tuple[int, list[Tensor]]] = []
        for peer, blocks in expected.items():
            tensors = self._unpack([payloads[block] for block in blocks], receives[peer])
            received += zip(blocks, tensors, strict=True)
        return received, {block: message for block, message in messages.items() if len(message)}

    def _message(self, payloads: Sequence[Payload], messages: Sequence[Tensor]) -> list[Tensor]:
        """The buffers for one peer: one per data type, then one of all compressed parameters."""
        flats = list(pack(_plain(payloads), self.device).values())
        compressed = torch.cat(list(messages))
        # An empty buffer is not sent: it would be a message of its own.
        return [*flats, compressed] if len(compressed) else flats

    def _empty_message(self, payloads: Sequence[Payload]) -> list[Tensor]:
        """Allocate the buffers that :meth:`_message` of the sender returns."""
        flats = list(empty_like_packed(_plain(payloads), self.device).values())
        compressed = sum(map(self._compressed_bytes, payloads))
        if compressed:
            flats.append(torch.empty(compressed, dtype=torch.uint8, device=self.device))
        return flats

    def _unpack(self, payloads: Sequence[Payload], flats: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors of each payload in one peer's message; uncompressed ones are views."""
        plain = _plain(payloads)
        types = list(by_dtype(plain))
        views = iter(unpack(dict(zip(types, flats, strict=False)), plain))
        # Behind the buffers of the data types, where :meth:`_message` puts it.
        compressed = flats[-1] if len(flats) > len(types) else None
        start = 0
        found: list[list[Tensor]] = []
        for payload in payloads:
            tensors = [next(views) for _ in payload.plain]
            end = start + self._compressed_bytes(payload)
            if compressed is not None and end > start:
                tensors += self._decompressed(compressed[start:end], payload)
            found.append(tensors)
            start = end
        return found

    def _compressed(self, payload: Payload) -> Tensor:
        if self._wire is None or not payload.compressed:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return self._wire.encode(flatten(arrange(payload.compressed)), payload.noise)

    def _compressed_bytes(self, payload: Payload) -> int:
        return self._wire.format.bytes(payload.entries) if self._wire is not None else 0

    def _decompressed(self, message: Tensor, payload: Payload) -> list[Tensor]:
        assert self._wire is not None
        return split(self._wire.decode(message, payload.entries), arrange(payload.compressed))


def _plain(payloads: Iterable[Payload]) -> list[Tensor]:
    """All uncompressed tensors, in the order of the message."""
    return [tensor for payload in payloads for tensor in payload.plain]

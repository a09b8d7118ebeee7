"""What workers send each other of divided tensors: one flat buffer per pair of workers and data type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.packing import empty_like_packed, pack, unpack
from resist_lightning.comm.tensors import all_sendable
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece, full_pieces
from resist_lightning.schedule.partition import Partition

Load: TypeAlias = tuple[str, Piece]
"""A piece of the divided tensor of this key."""
Arrived: TypeAlias = tuple[Load, Tensor]
"""A piece that is to be put in place here, and its values, flat."""


class Messages:
    """A worker's side of the messages.

    Args:
        collective: the workers.
        device: where slices live.
    """

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self._collective = collective
        self._worker = collective.worker
        self._device = device

    def transfer(self, parts: Mapping[str, Part], loads: Iterable[Load], held: Sequence[Partition]) -> list[Arrived]:
        """Send and receive pieces at once.

        Collective: every worker must call this, in the same order; only pairs with a piece talk.

        Args:
            parts: what this worker has, by key.
            loads: the pieces that leave or reach it, in an order that both ends agree upon.
            held: the partitions of the round that ends.

        Returns:
            What is to be put in place here; pieces that stay on this worker are copies, too.
        """
        outgoing: dict[int, list[Tensor]] = defaultdict(list)
        expected: dict[int, list[Load]] = defaultdict(list)
        stays: list[Arrived] = []
        kinds: Counter[str] = Counter()
        for key, piece in loads:
            if piece.source != self._worker:
                expected[piece.source].append((key, piece))
                continue
            values = parts[key].take(piece, held, self._worker)
            if piece.target == self._worker:
                stays.append(((key, piece), values))
            else:
                outgoing[piece.target].append(values)
                kinds[parts[key].kind] += values.nbytes
        # Popped, so that the pieces are freed once packed: there is one copy of what is sent.
        sends = {peer: self._pack(outgoing.pop(peer)) for peer in list(outgoing)}
        return stays + self._exchange(sends, expected, parts, kinds)

    def spread(self, parts: Mapping[str, Part], held: Sequence[Partition], kind: str) -> list[Arrived]:
        """Send all that this worker has to all others, and receive what they have.

        Collective: every worker must call this, in the same order.

        Args:
            parts: what this worker has, by key.
            held: the partitions of the round.
            kind: how the bytes are counted.
        """

        def of(worker: int) -> list[Load]:
            return [(key, piece) for key, part in parts.items() for piece in full_pieces(part.cut, held, worker)]

        mine = [((key, piece), parts[key].take(piece, held, self._worker)) for key, piece in of(self._worker)]
        peers = [worker for worker in range(self._collective.workers) if worker != self._worker]
        flats = self._pack([values for _, values in mine]) if peers else []
        kinds = Counter({kind: sum(flat.nbytes for flat in flats) * len(peers)})
        return mine + self._exchange(dict.fromkeys(peers, flats), {peer: of(peer) for peer in peers}, parts, kinds)

    def _exchange(
        self,
        sends: dict[int, list[Tensor]],
        expected: Mapping[int, list[Load]],
        parts: Mapping[str, Part],
        kinds: Counter[str],
    ) -> list[Arrived]:
        # A piece has no tensor here before it arrives; one on the meta device stands for its size and data type.
        likes: dict[int, list[Tensor]] = defaultdict(list)
        for peer, loads in expected.items():
            for key, piece in loads:
                entries, dtype = parts[key].entries(piece), parts[key].tensor.dtype
                likes[peer].append(torch.empty(entries, dtype=dtype, device="meta"))
        receives = {peer: empty_like_packed(likes[peer], self._device) for peer in expected}
        landing = {peer: flats.values() for peer, flats in receives.items()}
        self._collective.exchange(all_sendable(sends), all_sendable(landing), kinds)
        arrived: list[Arrived] = []
        for peer, loads in expected.items():
            arrived += zip(loads, unpack(receives[peer], likes[peer]), strict=True)
        return arrived

    def _pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(pack(tensors, self._device).values())

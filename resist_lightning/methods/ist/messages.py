"""Sends pieces of divided tensors between workers: one flat buffer per pair of workers and data type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.packing import empty_like_packed, pack, unpack
from resist_lightning.comm.tensors import all_sendable
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import Piece
from resist_lightning.schedule.partition import Partition

KeyedPiece: TypeAlias = tuple[str, Piece]
"""A piece of the divided tensor of this key."""
PiecesOf: TypeAlias = Callable[[Cut, int], Sequence[Piece]]
"""Gives the pieces of a tensor that a worker sends to make it whole elsewhere."""
Arrived: TypeAlias = tuple[KeyedPiece, Tensor]
"""A piece to write on this worker, and its values, flat."""


class Messages:
    """A worker's side of the messages."""

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self._collective = collective
        self._worker = collective.worker
        self._device = device

    def transfer(
        self,
        parts: Mapping[str, Part],
        pieces: Iterable[KeyedPiece],
        held: Sequence[Partition],
        kind: str = "hand_over",
    ) -> list[Arrived]:
        """Send and receive the pieces that leave or reach this worker, in an order that both ends agree upon.

        Collective: every worker must call this, in the same order; only pairs with a piece talk.

        Args:
            parts: this worker's, by key.
            pieces: what moves, by key.
            held: the partitions by which slices are cut.
            kind: how the bytes of all but optimizer state are counted.

        Returns:
            The pieces to write here; those that stay on this worker are copies, too.
        """
        outgoing: dict[int, list[Tensor]] = defaultdict(list)
        expected: dict[int, list[KeyedPiece]] = defaultdict(list)
        stays: list[Arrived] = []
        kinds: Counter[str] = Counter()
        # In the order of the list, which is how the other end unpacks them.
        for key, piece in pieces:
            if piece.source != self._worker:
                expected[piece.source].append((key, piece))
                continue
            values = parts[key].take(piece, held)
            if piece.target == self._worker:
                stays.append(((key, piece), values))
            else:
                outgoing[piece.target].append(values)
                kinds["state" if parts[key].is_state else kind] += values.nbytes
        sends = {}
        for peer in list(outgoing):
            # Popped, so that the pieces are freed once packed: there is one copy of what is sent.
            sends[peer] = self._pack(outgoing.pop(peer))
        return stays + self._exchange(sends, expected, parts, kinds)

    def spread(
        self,
        parts: Mapping[str, Part],
        pieces_of: PiecesOf,
        held: Sequence[Partition],
        kind: str,
        *,
        at_first: bool = False,
    ) -> list[Arrived]:
        """Send all parts of this worker to all others, or to worker 0 alone, and receive theirs.

        Collective: every worker must call this, in the same order.
        """
        mine: list[Arrived] = []
        for key, piece in _all_pieces(parts, pieces_of, self._worker):
            values = parts[key].take(piece, held)
            mine.append(((key, piece), values))
        peers = [worker for worker in range(self._collective.workers) if worker != self._worker]
        sources = peers if not at_first or self._worker == 0 else []
        targets = [peer for peer in peers if not at_first or peer == 0]
        expected = {peer: _all_pieces(parts, pieces_of, peer) for peer in sources}
        # All peers get the same buffers, so they are packed once.
        flats = self._pack([values for _, values in mine]) if targets else []
        sends = dict.fromkeys(targets, flats)
        sent = len(targets) * sum(flat.nbytes for flat in flats)
        return mine + self._exchange(sends, expected, parts, Counter({kind: sent}))

    def _exchange(
        self,
        sends: dict[int, list[Tensor]],
        expected: Mapping[int, list[KeyedPiece]],
        parts: Mapping[str, Part],
        kinds: Counter[str],
    ) -> list[Arrived]:
        # A piece has no tensor here before it arrives; one on the meta device stands for its size and data type.
        likes: dict[int, list[Tensor]] = defaultdict(list)
        for peer, pieces in expected.items():
            for key, piece in pieces:
                entries, dtype = parts[key].entries(piece), parts[key].tensor.dtype
                like = torch.empty(entries, dtype=dtype, device="meta")
                likes[peer].append(like)
        receives = {peer: empty_like_packed(likes[peer], self._device) for peer in expected}
        buffers = {peer: flats.values() for peer, flats in receives.items()}
        self._collective.exchange(all_sendable(sends), all_sendable(buffers), kinds)
        arrived: list[Arrived] = []
        for peer, pieces in expected.items():
            arrived += zip(pieces, unpack(receives[peer], likes[peer]), strict=True)
        return arrived

    def _pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(pack(tensors, self._device).values())


def _all_pieces(parts: Mapping[str, Part], pieces_of: PiecesOf, worker: int) -> list[KeyedPiece]:
    """All pieces that make a worker's parts, in an order that all workers agree upon."""
    found = []
    for key, part in parts.items():
        for piece in pieces_of(part.cut, worker):
            found.append((key, piece))
    return found

"""Sends pieces of divided tensors between workers: one flat buffer per pair of workers and data type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective, Meanwhile, do_nothing
from resist_lightning.comm.mean import send_to_first
from resist_lightning.comm.packing import empty_like_packed, unpack
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


_WORTH_DIVIDING = 2**18
"""Entries of a message from which on it is divided: below, they are packed in less than a millisecond."""


class Messages:
    """Packs pieces of divided tensors and exchanges them, packing some while others are sent."""

    def __init__(self, collective: Collective, device: torch.device) -> None:
        self._collective = collective
        self._worker = collective.worker
        self._device = device

    def transfer(
        self,
        parts: Mapping[str, Part],
        pieces: Iterable[KeyedPiece],
        held: Sequence[Partition],
        write: Callable[[list[Arrived]], None],
        kind: str = "hand_over",
    ) -> None:
        """Send and receive the pieces that leave or reach this worker, in the same order at both ends.

        A large message is sent in three turns::

            link                first     middle                              last
            this worker   pack  pack all  write what stays, then the first    write the middle    write the last

        Collective: every worker must call this, in the same order; only pairs with a piece talk.

        Args:
            parts: this worker's parts, by key.
            pieces: the pieces that move, by key.
            held: the partitions by which slices are cut.
            write: called with pieces to write here, some at a time; at first with copies of those that stay on this
                worker. By then all leaving pieces have been copied, and the parts are not read any more.
            kind: name under which all bytes but those of optimizer state are counted.
        """
        outgoing, expected, stays = self._by_peer(pieces)
        sends, receives = (_in_three(side, parts) for side in (outgoing, expected))
        packed = {0: self._packed(parts, sends[0], held)}
        arrived: list[list[Arrived]] = []

        divided = any(sends[1:] + receives[1:])

        def write_what_stays() -> None:
            write([((key, piece), parts[key].take(piece, held)) for key, piece in stays])

        def pack_the_rest() -> None:
            for turn in (1, 2):
                packed[turn] = self._packed(parts, sends[turn], held)
            if not divided:
                write_what_stays()

        def write_what_is_here() -> None:
            if divided:
                write_what_stays()
            write(arrived.pop())

        for turn, meanwhile in enumerate((pack_the_rest, write_what_is_here, lambda: write(arrived.pop()))):
            # Popped, so that buffers are freed once they are sent and written.
            kinds = _kinds(parts, sends[turn], kind)
            arrived.append(self._exchange(packed.pop(turn), receives[turn], parts, kinds, meanwhile))
        write(arrived.pop())

    def spread(
        self, parts: Mapping[str, Part], pieces_of: PiecesOf, held: Sequence[Partition], kind: str
    ) -> list[Arrived]:
        """Send parts of this worker to all others, and receive theirs.

        Collective: every worker must call this, in the same order.
        """
        peers = [worker for worker in range(self._collective.workers) if worker != self._worker]
        expected = {peer: _all_pieces(parts, pieces_of, peer) for peer in peers}
        # All peers get the same buffers, so they are packed once.
        flats, mine = self._pack(parts, _all_pieces(parts, pieces_of, self._worker), held)
        sends = dict.fromkeys(peers, flats)
        sent = len(peers) * sum(flat.nbytes for flat in flats)
        return mine + self._exchange(sends, expected, parts, Counter({kind: sent}))

    def own(self, parts: Mapping[str, Part], pieces_of: PiecesOf, held: Sequence[Partition]) -> list[Arrived]:
        """Copies of the pieces that this worker would send of its parts. Sends nothing."""
        return self._pack(parts, _all_pieces(parts, pieces_of, self._worker), held)[1]

    def collect(
        self, parts: Mapping[str, Part], pieces_of: PiecesOf, held: Sequence[Partition], kind: str, peer: int
    ) -> list[Arrived]:
        """Send parts of one worker to worker 0, where they are returned.

        Collective: every worker must call this, in the same order; only these two talk.
        """
        flats: list[Tensor] = []
        arriving: list[Arrived] = []
        pieces = _all_pieces(parts, pieces_of, peer)
        if self._worker == peer:
            flats, _ = self._pack(parts, pieces, held)
        elif self._worker == 0:
            flats, arriving = self._space(parts, pieces)
        send_to_first(self._collective, peer, flats, kind)
        return arriving

    def _by_peer(
        self, pieces: Iterable[KeyedPiece]
    ) -> tuple[dict[int, list[KeyedPiece]], dict[int, list[KeyedPiece]], list[KeyedPiece]]:
        """The pieces that leave, by target, those that arrive, by source, and those that stay on this worker."""
        outgoing: dict[int, list[KeyedPiece]] = defaultdict(list)
        expected: dict[int, list[KeyedPiece]] = defaultdict(list)
        stays: list[KeyedPiece] = []
        # In the order of the list, in which the other end unpacks them.
        for key, piece in pieces:
            if piece.source != self._worker:
                expected[piece.source].append((key, piece))
            elif piece.target == self._worker:
                stays.append((key, piece))
            else:
                outgoing[piece.target].append((key, piece))
        return outgoing, expected, stays

    def _packed(
        self, parts: Mapping[str, Part], sends: Mapping[int, list[KeyedPiece]], held: Sequence[Partition]
    ) -> dict[int, list[Tensor]]:
        return {peer: self._pack(parts, leaving, held)[0] for peer, leaving in sends.items()}

    def _exchange(
        self,
        sends: dict[int, list[Tensor]],
        expected: Mapping[int, list[KeyedPiece]],
        parts: Mapping[str, Part],
        kinds: Counter[str],
        meanwhile: Meanwhile = do_nothing,
    ) -> list[Arrived]:
        flats: dict[int, list[Tensor]] = {}
        arriving: list[Arrived] = []
        for peer, pieces in expected.items():
            flats[peer], arrived = self._space(parts, pieces)
            arriving += arrived
        self._collective.exchange(all_sendable(sends), all_sendable(flats), kinds, meanwhile)
        return arriving

    def _pack(
        self, parts: Mapping[str, Part], pieces: Sequence[KeyedPiece], held: Sequence[Partition]
    ) -> tuple[list[Tensor], list[Arrived]]:
        """Pieces of this worker in flat buffers, and each as a view of its buffer."""
        flats, views = self._space(parts, pieces)
        for (key, piece), view in views:
            parts[key].take(piece, held, into=view)
        return flats, views

    def _space(self, parts: Mapping[str, Part], pieces: Sequence[KeyedPiece]) -> tuple[list[Tensor], list[Arrived]]:
        """Memory for a message: its flat buffers, and the place of each piece in them."""
        likes = []
        for key, piece in pieces:
            entries, dtype = parts[key].entries(piece), parts[key].tensor.dtype
            likes.append(torch.empty(entries, dtype=dtype, device="meta"))
        flats = empty_like_packed(likes, self._device)
        views = list(zip(pieces, unpack(flats, likes), strict=True))
        return list(flats.values()), views


def _in_three(messages: Mapping[int, list[KeyedPiece]], parts: Mapping[str, Part]) -> list[dict[int, list[KeyedPiece]]]:
    """Messages by peer, divided in three turns: a small part, most of the message, and another small part."""
    turns: list[dict[int, list[KeyedPiece]]] = [{}, {}, {}]
    for peer, pieces in messages.items():
        total = sum(parts[key].entries(piece) for key, piece in pieces)
        # Both ends know the sizes, and so decide alike.
        ends = [total] if total < _WORTH_DIVIDING else [total // 8, total - total // 8, total]
        for turn, some in zip(turns, _divided(pieces, parts, ends), strict=False):
            if some:
                turn[peer] = some
    return turns


def _divided(pieces: Iterable[KeyedPiece], parts: Mapping[str, Part], ends: Sequence[int]) -> list[list[KeyedPiece]]:
    """Pieces in order, divided after the entries ``ends``, or a row later; a piece without rows stays whole."""
    divided: list[list[KeyedPiece]] = [[] for _ in ends]
    gone = turn = 0
    for key, piece in pieces:
        left: Piece | None = piece
        while left is not None:
            while turn < len(ends) - 1 and gone >= ends[turn]:
                turn += 1
            some, left = _split(left, parts[key].entries(left), ends[turn] - gone)
            gone += parts[key].entries(some)
            divided[turn].append((key, some))
    return divided


def _split(piece: Piece, entries: int, wanted: int) -> tuple[Piece, Piece | None]:
    """The first rows of a piece, with as many entries as wanted or some more, and the other rows."""
    if piece.rows is None or entries <= wanted:
        return piece, None
    rows = -(-wanted * len(piece.rows) // entries)
    if rows == len(piece.rows):
        return piece, None
    return replace(piece, rows=piece.rows[:rows]), replace(piece, rows=piece.rows[rows:])


def _kinds(parts: Mapping[str, Part], sends: Mapping[int, list[KeyedPiece]], kind: str) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for pieces in sends.values():
        for key, piece in pieces:
            part = parts[key]
            kinds["state" if part.is_state else kind] += part.entries(piece) * part.tensor.element_size()
    return kinds


def _all_pieces(parts: Mapping[str, Part], pieces_of: PiecesOf, worker: int) -> list[KeyedPiece]:
    """All pieces that make a worker's parts, in the same order on all workers."""
    found = []
    for key, part in parts.items():
        for piece in pieces_of(part.cut, worker):
            found.append((key, piece))
    return found

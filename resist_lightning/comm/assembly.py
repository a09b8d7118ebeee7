"""Assembles the blocks of the full model: on every worker, or on worker 0 alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.mean import mean_into, send_to_first
from resist_lightning.comm.packing import copy_into, empty_like_packed, pack, unpack

TensorsOf: TypeAlias = Callable[[int], Sequence[Tensor]]
"""The tensors of a block, by its number."""


def collect(exchange: Exchange, sources: Mapping[int, Sequence[int]], tensors_of: TensorsOf, kind: str) -> None:
    """Give worker 0 each block, as the mean over its source workers; the others only send theirs.

    A block at a time, so that a sending worker needs memory for one more block, and worker 0 for the copies of one.

    Collective: every worker must call this, in the same order; only worker 0 and those that send talk.

    Args:
        exchange: this worker's.
        sources: for each block, the workers whose values are averaged, its owner first; none where worker 0 needs none.
        tensors_of: the tensors of a block; worker 0 must have memory for them.
        kind: how the bytes are counted.
    """
    me = exchange.collective.worker
    for block, workers in sources.items():
        arrived: dict[int, Sequence[Tensor]] = {}
        for peer in sorted(set(workers) - {0}):
            arrived[peer] = _value_of(exchange, peer, tensors_of(block) if me in (0, peer) else (), kind)
        if me == 0 and arrived:
            _take(exchange, tensors_of(block), workers, arrived)


def _value_of(exchange: Exchange, peer: int, tensors: Sequence[Tensor], kind: str) -> Sequence[Tensor]:
    """Send tensors from worker ``peer`` to worker 0, which returns them; nothing on all others. Collective."""
    me = exchange.collective.worker
    flats = (pack if me == peer else empty_like_packed)(tensors, exchange.device)
    send_to_first(exchange.collective, peer, list(flats.values()), kind)
    return unpack(flats, tensors) if me == 0 else ()


def _take(
    exchange: Exchange, own: Sequence[Tensor], workers: Sequence[int], arrived: Mapping[int, Sequence[Tensor]]
) -> None:
    """Write the mean over some workers into worker 0's tensors, computed as the first of them would compute it."""
    values = []
    for worker in workers:
        # Worker 0's own are copied, as the mean is written over them.
        values.append(arrived[worker] if worker > 0 else [tensor.detach().clone() for tensor in own])
    copy_into(own, values[0])
    others = values[1:]
    if others:
        for tensor, row in zip(own, zip(*others, strict=True), strict=True):
            mean_into(tensor, row)
        exchange.normalise(own)

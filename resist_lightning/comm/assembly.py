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
    """Give worker 0 each block, as the mean of the values that some workers have; the others only send theirs.

    A block at a time, so that a worker that sends needs the memory of one block beside what it holds, and worker 0 that
    of the values of one.

    Collective: every worker must call this, in the same order; only worker 0 and those that send talk.

    Args:
        exchange: the worker's side of it.
        sources: for each block, the workers whose values count, its owner first; nobody where worker 0 needs none.
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
    """What worker 0 receives of a worker's tensors, and that worker sends; nothing on all others. Collective."""
    me = exchange.collective.worker
    flats = (pack if me == peer else empty_like_packed)(tensors, exchange.device)
    send_to_first(exchange.collective, peer, list(flats.values()), kind)
    return unpack(flats, tensors) if me == 0 else ()


def _take(
    exchange: Exchange, own: Sequence[Tensor], workers: Sequence[int], arrived: Mapping[int, Sequence[Tensor]]
) -> None:
    """Write the mean over some workers into worker 0's tensors, as the first of them would take it."""
    values = []
    for worker in workers:
        # Worker 0's own are copied, unless the mean is taken in them.
        values.append(arrived[worker] if worker > 0 else [tensor.detach().clone() for tensor in own])
    copy_into(own, values[0])
    others = values[1:]
    if others:
        for tensor, row in zip(own, zip(*others, strict=True), strict=True):
            mean_into(tensor, row)
        exchange.normalise(own)

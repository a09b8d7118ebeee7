"""Sends every worker its parts of worker 0's module for the first round, when the training starts."""

from __future__ import annotations

from collections.abc import Callable

from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.payload import Payload
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.transfers import SyncPlan, Transfer

KIND = "start"


def hand_out(layout: BlockLayout, round: int, exchange: Exchange, payload_of: Callable[[int], Payload]) -> None:
    """Send worker 0's shared tensors to all workers, and each block to its holders in ``round``.

    One block at a time: worker 0, which may have the whole model, needs memory for one message beside it, and so does
    a worker that receives. Collective: every worker must call this, in the same order.

    Args:
        layout: the model's parts; on worker 0 all present, on the others those that they hold.
        round: the round in which the training begins.
        exchange: sends and receives.
        payload_of: gives the payload of a block.
    """
    exchange.broadcast(list(layout.shared.values()), KIND)
    if exchange.collective.worker == 0:
        exchange.make_members_alike((t for block in layout.blocks for t in block.tensors().values()), KIND)
    partition = layout.partition(round)
    for block in range(partition.blocks):
        transfers = tuple(Transfer(0, holder, block) for holder in partition.holders(block) if holder != 0)
        exchange.hand_over(SyncPlan((), {}, (), transfers), payload_of, lambda: None, KIND)

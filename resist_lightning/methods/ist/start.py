"""Sends every worker its slices and its stores of worker 0's module, when the training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from resist_lightning.comm.exchange import Exchange
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.messages import Arrived, Messages
from resist_lightning.methods.ist.parts import in_groups
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import first_pieces
from resist_lightning.schedule.partition import Partition

KIND = "start"


def hand_out(
    layout: NeuronLayout, round: int, exchange: Exchange, messages: Messages, parts: Mapping[str, Part]
) -> None:
    """Send worker 0's shared tensors to all workers, and the parts of divided tensors to their holders in ``round``.

    Some tensors and one worker at a time, so that worker 0, which has the whole model, needs memory for one message
    beside it, and so does a worker that receives. Collective: every worker must call this, in the same order.

    Args:
        layout: the division of tensors.
        round: the round in which the training begins.
        exchange: sends the shared tensors.
        messages: sends pieces of divided ones.
        parts: parts of divided tensors, by name; on worker 0 the full tensors, on the others slices and stores.
    """
    exchange.broadcast(list(layout.shared.values()), KIND)
    me, held = exchange.collective.worker, layout.partition(round)
    if me == 0:
        exchange.make_members_alike((part.tensor for part in parts.values()), KIND)
    for some in in_groups(parts):
        for worker in range(1, layout.workers):
            moving = []
            for name, part in some.items() if me in (0, worker) else ():
                moving += [(name, piece) for piece in first_pieces(part.cut, held, worker)]
            messages.transfer(some, moving, held, partial(_put, some, held), KIND)


def _put(parts: Mapping[str, Part], held: Sequence[Partition], arrived: Iterable[Arrived]) -> None:
    for (key, piece), values in arrived:
        parts[key].put(piece, held, values)

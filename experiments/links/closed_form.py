"""Bytes that a worker, or the workers of a node, must send and receive in the syncs of some rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain
from math import prod

from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.engine.engine import Engine
from resist_lightning.methods.ist.holders import handed_over_pieces, merged_pieces
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.plan import pieces
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.state.optimizer_state import OptimizerStates


def closed_form(engine: Engine, rounds: Iterable[int], workers: Collection[int]) -> list[dict[str, int]]:
    """For the sync that ends each of these rounds: bytes that these workers send to others, and receive from them.

    Several workers must have consecutive numbers, and send blocks uncompressed.
    """
    layout = engine.layout
    if isinstance(layout, NeuronLayout):
        (worker,) = workers
        return [_of_neurons(layout, engine.states, number, worker) for number in rounds]
    schedule, found = layout.schedule, []
    for number in rounds:
        plan = schedule.plan(number)
        sizes = layout.sizes(engine.states, plan.fragment)
        # A ring: of neighbours, one sends to another worker, and one receives.
        shared = sync_bytes(plan, sizes, schedule.workers)[min(workers)]["shared"]
        sums = {"sent": shared, "received": shared}
        for transfer in (*plan.merge, *plan.hand_over):
            if (transfer.source in workers) != (transfer.target in workers):
                direction = "sent" if transfer.source in workers else "received"
                sums[direction] += sizes.blocks[transfer.block] + sizes.states[transfer.block]
        found.append(sums)
    return found


def neuron_bytes(layout: NeuronLayout, states: OptimizerStates, round: int) -> list[int]:
    """Bytes that each IST worker sends at the end of ``round``: its slices, and a mean of tensors that all hold."""
    return [sum(sent.values()) + shared_bytes(layout) for sent in layout.hand_over_bytes(round, states)]


def shared_bytes(layout: NeuronLayout) -> int:
    """Bytes that each worker of IST sends at a sync for the mean of tensors that all hold whole."""
    changing, sizes = layout.changing(), Counter[object]()
    for name, tensor in layout.shared.items():
        if name in changing:
            sizes[tensor.dtype] += tensor.nbytes
    return sum(all_reduce_bytes(size, layout.workers) for size in sizes.values())


def _of_neurons(layout: NeuronLayout, states: OptimizerStates, round: int, worker: int) -> dict[str, int]:
    """Bytes of a worker of IST; received ones are counted over the pieces of the plan, without optimizer state."""
    plan, received = layout.plan(round), shared_bytes(layout)
    tensors = {**dict(layout.module.named_parameters()), **dict(layout.module.named_buffers())}
    all_moves = (merged_pieces, handed_over_pieces) if plan.several_holders else (pieces,)
    for name, cut in layout.neurons.cuts.items():
        bytes_of_each = layout.rest(name) * tensors[name].element_size()
        for piece in chain.from_iterable(moves(cut, plan, worker) for moves in all_moves):
            if piece.source != worker == piece.target:
                # A side that is None is not cut: `rest` counts it.
                sides = [len(side) for side in (piece.rows, piece.columns) if side is not None]
                received += prod(sides) * bytes_of_each
    return {"sent": neuron_bytes(layout, states, round)[worker], "received": received}

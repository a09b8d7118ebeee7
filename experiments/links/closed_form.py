"""Bytes that a worker must send and receive in the syncs of some rounds."""

from __future__ import annotations

from collections.abc import Iterable

from resist_lightning.accounting import sync_bytes
from resist_lightning.engine import Engine
from resist_lightning.plan import plan_sync


def closed_form(engine: Engine, rounds: Iterable[int], worker: int) -> list[dict[str, int]]:
    """For the sync that ends each of these rounds: bytes sent and received by the worker."""
    schedule, sizes = engine.layout.schedule, engine.layout.sizes(engine.states)
    found = []
    for number in rounds:
        plan = plan_sync(schedule.partition(number), schedule.partition(number + 1))
        sent = sync_bytes(plan, sizes, schedule.workers)[worker]
        arriving = [transfer for transfer in (*plan.merge, *plan.hand_over) if transfer.target == worker]
        moved = sum(sizes.blocks[transfer.block] + sizes.states[transfer.block] for transfer in arriving)
        found.append({"sent": sum(sent.values()), "received": sent["shared"] + moved})
    return found

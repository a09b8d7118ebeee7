"""Counts the bytes that real workers hold and send while they train a few rounds over TCP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from experiments.harness.memory import held_bytes
from experiments.harness.workers import forked
from experiments.paper_tables.networks import memory_bytes
from experiments.trainers import sgd_step
from resist_lightning import Config, Engine
from resist_lightning.comm.byte_formulas import TRAINING_KINDS
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.models import preact_resnet
from resist_lightning.schedule.transfers import plan_sync

ROUNDS, LOCAL_STEPS, BATCH, IMAGE = 3, 2, 2, 16


@dataclass(frozen=True)
class Group:
    """Workers whose memory is measured: their number, and the width of the paper's "101"."""

    workers: int
    width: float


def measure_group(group: Group) -> dict[str, Any]:
    """Start the workers, let them train, and gather the bytes that each of them held after every local step."""
    told = forked(_train, group, group.workers)
    return {
        "workers": group.workers,
        "width_multiplier": group.width,
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "full_bytes": told[0].pop("full_bytes"),
        "by_worker": told,
    }


def _train(worker: int, group: Group) -> dict[str, Any]:
    torch.manual_seed(0)
    model = preact_resnet(101, num_classes=100, width_multiplier=group.width, track_running_stats=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    engine = Engine(model, [optimizer], Config(local_steps=LOCAL_STEPS, batch_norm="batch"))
    full = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in engine.layout.blocks[0].module.parameters())
    shared = full - len(engine.layout.blocks) * block
    engine.start()
    steps = []
    by_formula = 0
    for _ in range(ROUNDS * LOCAL_STEPS):
        sgd_step(model, optimizer, torch.randn(BATCH, 3, IMAGE, IMAGE), torch.zeros(BATCH).long())
        blocks = len(engine.partition.held[worker])
        bound = int(memory_bytes(shared, block, blocks))
        steps.append({"blocks": blocks, "held_bytes": held_bytes(model, optimizer), "bound_bytes": bound})
        before = engine.partition
        engine.after_step()
        if engine.clock.step == 0:  # a round has ended: its sync is done
            plan = plan_sync(before, engine.partition)
            by_formula += sum(sync_bytes(plan, engine.layout.sizes(engine.states), group.workers)[worker].values())
    sent = sum(engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS)
    engine.abandon()
    return {
        "full_bytes": int(memory_bytes(full, 0, 0)),
        "steps": steps,
        "sent_bytes": sent,
        "sent_bytes_by_formula": by_formula,
    }

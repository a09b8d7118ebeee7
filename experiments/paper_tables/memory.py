"""What real workers hold and send: processes of their own, over TCP, that train a few rounds and count."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import multiprocessing as torch_processes

from experiments.benchmarks.held_memory import held_bytes
from experiments.paper_tables.networks import memory_bytes
from resist_lightning import Config, Engine
from resist_lightning.comm.bytes import TRAINING_KINDS
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.models import preact_resnet
from resist_lightning.schedule.transfers import plan_sync

ROUNDS, LOCAL_STEPS, BATCH, IMAGE = 3, 2, 2, 16
Program: TypeAlias = Callable[[int, Any], dict[str, Any]]
PATIENCE = timedelta(seconds=120)


@dataclass(frozen=True)
class Group:
    """Workers whose memory is measured: how many, and how wide the paper's "101" is."""

    workers: int
    width: float


def measure_group(group: Group) -> dict[str, Any]:
    """Start the workers, let them train, and gather what each of them held after every local step.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; the others are ended.
    """
    told = forked(_train, group, group.workers)
    return {
        "workers": group.workers,
        "width_multiplier": group.width,
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "full_bytes": told[0].pop("full_bytes"),
        "by_worker": told,
    }


def forked(program: Program, task: Any, workers: int) -> list[dict[str, Any]]:
    """Run ``program(worker, task)`` in so many processes of one process group; what each returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; the others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="forked_") as folder:
        # Forked, so that not every worker imports torch anew: call this before anything is computed here.
        arguments = (program, task, workers, folder)
        torch_processes.start_processes(_work, arguments, nprocs=workers, daemon=True, start_method="fork")
        return [json.loads((Path(folder) / f"{worker}.json").read_text()) for worker in range(workers)]


def _work(worker: int, program: Program, task: Any, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    handshake = f"file://{folder}/handshake"
    dist.init_process_group("gloo", init_method=handshake, rank=worker, world_size=workers, timeout=PATIENCE)
    try:
        (Path(folder) / f"{worker}.json").write_text(json.dumps(program(worker, task)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


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
        optimizer.zero_grad()
        model(torch.randn(BATCH, 3, IMAGE, IMAGE)).sum().backward()
        optimizer.step()
        blocks = len(engine.partition.held[worker])
        bound = int(memory_bytes(shared, block, blocks))
        steps.append({"blocks": blocks, "held_bytes": held_bytes(model, optimizer), "bound_bytes": bound})
        before = engine.partition
        engine.after_step()
        if engine.clock.step == 0:
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

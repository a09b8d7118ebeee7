"""A worker of `run.py`: trains with equal shares and with shares that follow speed, turn and turn about."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from resist_lightning import Config, Engine
from resist_lightning.methods.resist.shares import MEASURED_ROUNDS
from resist_lightning.models import PreActResNet

FIRST = {"equal": 1, "auto": 1 + MEASURED_ROUNDS + 1}
"""The first round that counts: the caches are warm, and the shares are what they stay."""


def train(worker: int, settings: dict[str, Any], shares: str, rounds: int) -> dict[str, Any]:
    """One training; its rounds from the first that counts, with this worker's blocks and wall seconds."""
    torch.manual_seed(0)
    model = PreActResNet(settings["sections"], 10, width_multiplier=settings["width"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    config = Config(
        local_steps=settings["local_steps"], min_blocks=settings["min_blocks"], blocks_per_worker=shares
    )  # fmt: skip
    engine = Engine(model, [optimizer], config)
    images, labels = torch.randn(settings["batch"], 3, 32, 32), torch.zeros(settings["batch"], dtype=torch.long)
    engine.start()
    model.train()
    seen = []
    for number in range(FIRST[shares] + rounds):
        began, stepping, blocks = time.perf_counter(), 0.0, len(engine.partition.held[worker])
        for _ in range(settings["local_steps"]):
            started = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            stepping += time.perf_counter() - started
            engine.after_step()
        if number >= FIRST[shares]:
            step_seconds = stepping / settings["local_steps"]
            seen.append({"seconds": time.perf_counter() - began, "step_seconds": step_seconds, "blocks": blocks})
    schedule = engine.layout.schedule
    engine.finish()
    costs = [{"shared": cost.shared, "block": cost.block} for cost in schedule.costs()]
    return {"shares": shares, "rounds": seen, "table": schedule.state_dict(), "costs": costs}


def main() -> None:
    settings, worker = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    folder = Path(sys.argv[1]).parent
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=worker,
        world_size=settings["workers"],
        timeout=timedelta(seconds=60),
    )
    train(worker, settings, "equal", 1)  # at full speed: nothing is measured cold
    dist.barrier()
    Path(settings["groups"][worker]).write_text(str(os.getpid()))
    runs = [train(worker, settings, shares, settings["rounds"]) for _ in range(settings["turns"]) for shares in FIRST]
    (folder / f"result.{worker}").write_text(json.dumps(runs))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Seconds per round with one slow worker: equal shares against shares that follow speed.

python experiments/unequal/run.py workers=2
python experiments/unequal/run.py workers=4
python experiments/unequal/run.py size=smoke out=runs/unequal

Every worker is a process with a part of a core (a quota of its cgroup); the last one has a third of the others'. Both
settings train interleaved in one run. Prints a table, and writes unequal_N.jsonl and unequal.png.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.workers import forked
from experiments.trainers import sgd_step
from experiments.unequal import tables
from experiments.unequal.figure import draw_steps
from experiments.unequal.quota import quotas, why_no_quota
from resist_lightning import Config, Engine
from resist_lightning.methods.resist.shares import MEASURED_ROUNDS, Cost, slowest
from resist_lightning.models import PreActResNet
from resist_lightning.schedule.partition import blocks_per_worker

# The first round that counts: the caches are warm, and the shares no longer change.
FIRST = {"equal": 1, "auto": 1 + MEASURED_ROUNDS + 1}


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result files", smoke="runs/unequal")
    workers: int = option(2, "processes", least=2)
    slowdown: float = option(3.0, "how many times slower the last worker is", least=1)
    cores: float | None = option(None, "cores of each other worker; null: 1.2 / workers", above=0)
    blocks: int = option(24, "partitioned blocks", least=2, smoke=8)
    min_blocks: int = option(2, "minimum blocks per worker", least=0)
    width: float = option(1 / 8, "1.0 is the paper's", above=0, smoke=1 / 16)
    batch: int = option(8, "images", least=1, smoke=2)
    local_steps: int = option(10, "per round", least=1, smoke=4)
    rounds: int = option(4, "rounds that count in each training", least=1, smoke=2)
    turns: int = option(5, "repetitions of both settings", least=1, smoke=1)

    def recorded(self) -> dict[str, Any]:
        """The settings for the workers and the record."""
        cores = [self.cores or 1.2 / self.workers] * self.workers
        cores[-1] /= self.slowdown
        same = self.take("workers", "width", "batch", "local_steps", "min_blocks", "rounds", "turns")
        return {"cores": cores, "sections": [1, 1, self.blocks + 1, 1], **same}


def train(worker: int, settings: dict[str, Any], shares: Any, rounds: int) -> dict[str, Any]:
    """Train once; returns the rounds from the first that counts, with this worker's blocks and wall seconds."""
    torch.manual_seed(0)
    model = PreActResNet(settings["sections"], 10, width_multiplier=settings["width"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    local_steps = settings["local_steps"]
    config = Config(local_steps=local_steps, min_blocks=settings["min_blocks"], blocks_per_worker=shares)
    engine = Engine(model, [optimizer], config)
    images = torch.randn(settings["batch"], 3, 32, 32)
    labels = torch.zeros(settings["batch"], dtype=torch.long)
    engine.start()
    model.train()
    seen = []
    for number in range(FIRST[shares] + rounds):
        blocks = len(engine.partition.held[worker])
        began, stepping = time.perf_counter(), 0.0  # of the round with its sync, and of its local steps
        for _ in range(local_steps):
            started = time.perf_counter()
            sgd_step(model, optimizer, images, labels)
            stepping += time.perf_counter() - started
            engine.after_step()
        if number >= FIRST[shares]:
            whole = time.perf_counter() - began
            seen.append({"seconds": whole, "step_seconds": stepping / local_steps, "blocks": blocks})
    schedule = engine.layout.schedule
    engine.finish()
    costs = [{"shared": cost.shared, "block": cost.block} for cost in schedule.costs()]
    return {"shares": shares, "rounds": seen, "table": schedule.state_dict(), "costs": costs}


def work(worker: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A worker: joins its cgroup, then trains with both settings, interleaved."""
    train(worker, settings, "equal", 1)  # before the quota, at full speed: nothing is measured cold
    dist.barrier()
    Path(settings["groups"][worker]).write_text(str(os.getpid()))
    return [train(worker, settings, shares, settings["rounds"]) for _ in range(settings["turns"]) for shares in FIRST]


def rows_of(settings: dict[str, Any], trainings: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per training: blocks and seconds of each worker, and the prediction from the measured costs."""
    blocks = settings["sections"][2] - 1
    equal = blocks_per_worker(blocks, settings["workers"], settings["min_blocks"])
    rows = []
    for turn, runs in enumerate(zip(*trainings, strict=True)):  # each is one training, as every worker saw it
        rounds = list(zip(*(run["rounds"] for run in runs), strict=True))
        row = {
            "turn": turn // len(FIRST),
            "shares": runs[0]["shares"],
            "blocks": [worker["blocks"] for worker in rounds[-1]],
            "round_seconds": [max(worker["seconds"] for worker in round) for round in rounds],
            "step_seconds": [mean(one["step_seconds"] for one in run["rounds"]) for run in runs],
            "table": runs[0]["table"],
        }
        costs = [Cost(**cost) for cost in runs[0]["costs"]]
        if costs:  # they are measured where shares follow speed
            before = slowest(costs, equal)
            row["predicted"] = before / slowest(costs, row["blocks"])
            row["bound"] = before / slowest(costs, [settings["min_blocks"]] * len(costs))
        rows.append(row)
    return rows


def run(_: Sequence[str], options: Options) -> None:
    if reason := why_no_quota():
        raise ConfigError(f"a worker cannot be slowed down here: {reason}")
    settings, out = options.recorded(), Path(options.out)
    with quotas(settings["cores"]) as groups:
        trainings = forked(work, {**settings, "groups": list(map(str, groups))}, options.workers)
    content = {"settings": settings, "rows": rows_of(settings, trainings)}
    write_record(out / f"unequal_{options.workers}.jsonl", content)
    tables.compared([content]).show()
    print(f"wrote {draw_steps(out / 'unequal.png', tables.records(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))

"""Seconds of a local step of a sub-network, beside a plain loop over a network that has only its blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.benchmarks.steps import NEVER, only_blocks
from experiments.gpu.cases import Steps
from experiments.harness.workers import forked
from experiments.trainers import make_optimizer, sgd_step
from resist_lightning import Config, Engine
from resist_lightning.models import preact_resnet

RANKS = 2
ROUNDS, LOCAL_STEPS = 4, 2  # of the training whose compiled graphs are counted
LR = 0.001


@dataclass(frozen=True)
class Task:
    """The settings of a rank."""

    case: Steps
    device: str
    width: float  # 1.0 is the paper's
    batch: int
    pixels: int
    steps: int  # that are timed together
    turns: int  # of both, in turn
    compiler: str  # of blocks

    @property
    def compiled(self) -> bool:
        return "compiled" in self.case.mode


def measure(task: Task) -> dict[str, Any]:
    """Worker 0 trains alone while the other one waits, so that nobody shares the device with it."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of compilers starts slower than one block compiles
    return forked(_time, task, RANKS)[0]


def _time(rank: int, task: Task) -> dict[str, Any]:
    set_precision(task.case.mode)
    subnet = make_network(task)
    optimizer = make_optimizer(subnet, LR)
    engine = Engine(subnet, [optimizer], Config(local_steps=NEVER, min_blocks=1))
    engine.start()
    found: dict[str, Any] = {}
    if rank == 0:
        held = engine.partition.held[rank]
        found = _beside_a_plain_loop(task, engine, optimizer, only_blocks(make_network(task), held))
    dist.barrier()
    engine.abandon()
    return {**found, **(_count_graphs(task) if task.compiled else {})}


def _beside_a_plain_loop(
    task: Task, engine: Engine, optimizer: torch.optim.Optimizer, alone: nn.Module
) -> dict[str, Any]:
    alone_optimizer = make_optimizer(alone, LR)
    x, y = batch(task)

    def subnet_step() -> None:
        with autocast(task):
            sgd_step(engine.module.train(), optimizer, x, y)
        engine.after_step()

    def plain_step() -> None:
        with autocast(task):
            sgd_step(alone.train(), alone_optimizer, x, y)

    seconds: dict[str, list[float]] = {"plain loop": [], "sub-network": []}
    for turn in range(task.turns + 1):  # the first one warms up, and compiles
        for name, step in (("plain loop", plain_step), ("sub-network", subnet_step)):
            found = seconds_of(step, task.steps, task.device)
            if turn:
                seconds[name].append(found)
    medians = {name: median(values) for name, values in seconds.items()}
    return {"median_seconds": medians, "ratio": medians["sub-network"] / medians["plain loop"], "seconds": seconds}


def _count_graphs(task: Task) -> dict[str, int]:
    """Graphs that were compiled for the blocks in the first round, and in the rounds after it, with other partitions."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    network = make_network(task)
    optimizer = make_optimizer(network, LR)
    engine = Engine(network, [optimizer], Config(local_steps=LOCAL_STEPS, min_blocks=1))
    engine.start()
    x, y = batch(task)
    graphs = []
    for _ in range(ROUNDS * LOCAL_STEPS):
        with autocast(task):
            sgd_step(network.train(), optimizer, x, y)
        graphs.append(int(counters["stats"]["unique_graphs"]))
        engine.after_step()
    engine.finish()
    first = graphs[LOCAL_STEPS - 1]
    return {"graphs": first, "recompiles": graphs[-1] - first}


def make_network(task: Task) -> nn.Module:
    """The paper's network, in the mode's memory format, its partitioned blocks compiled if the mode says so."""
    torch.manual_seed(0)
    network: Any = preact_resnet(101, num_classes=10, width_multiplier=task.width).to(task.device)
    if "channels_last" in task.case.mode:
        network = network.to(memory_format=torch.channels_last)
    if task.compiled:
        for block in network.section3[1:]:
            block.compile(backend=task.compiler)
    return network


def batch(task: Task) -> tuple[Tensor, Tensor]:
    """The batch of all local steps."""
    x = torch.randn(task.batch, 3, task.pixels, task.pixels, device=task.device)
    if "channels_last" in task.case.mode:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(task.batch, dtype=torch.long, device=task.device)


def autocast(task: Task) -> AbstractContextManager[Any]:
    device = torch.device(task.device).type
    return torch.autocast(device, torch.bfloat16) if "bf16" in task.case.mode else nullcontext()


def set_precision(mode: str) -> None:
    """Set the precision of operations that stay in fp32."""
    torch.set_float32_matmul_precision("highest" if mode == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = mode != "fp32"
    torch.backends.cudnn.benchmark = True


def seconds_of(step: Callable[[], None], steps: int, device: str) -> float:
    """Mean over so many steps; waits for a GPU only before and after all of them."""
    wait: Callable[[], object] = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def _nothing() -> None:
    """A no-op: a CPU's calls return when they are done."""

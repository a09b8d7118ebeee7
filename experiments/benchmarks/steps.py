"""Measures, in the workers, held memory, a sync with its checks, and a step beside a plain loop."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.app.quiet import hush
from experiments.harness.memory import held_bytes, resident_bytes
from experiments.trainers import Module, make_optimizer, quiet_trainer, sgd_step
from resist_lightning import Config, Engine, LocalSGDStrategy, ResISTStrategy
from resist_lightning.checks.header import Purpose
from resist_lightning.models import PreActResNet, preact_resnet

NEVER = 10**6  # local steps of a round that does not end


class Clock(L.Callback):
    """Notes the start of each batch, fetching included."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from the start of each batch to the start of the next; the first one warms up."""
        return [after - before for before, after in pairwise(self.starts[1:])]


def held_memory(worker: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes of parameters, gradients and momentum after each local step, against the bound and the full model."""
    torch.manual_seed(0)
    model = preact_resnet(settings["depth"], num_classes=10, width_multiplier=settings["width"])
    full = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    engine = Engine(model, [optimizer], Config(local_steps=2))
    statistics = sum(buffer.nbytes for buffer in model.buffers())
    blocks = [sum(p.nbytes for p in block.module.parameters()) for block in engine.layout.blocks]
    engine.start()
    worst = {"held": 0, "bound": 0, "resident": 0}
    for _ in range(2 * settings["rounds"]):
        sgd_step(model, optimizer, torch.randn(2, 3, 32, 32), torch.zeros(2).long())
        own_blocks = sum(blocks[block] for block in engine.partition.held[worker])
        bound = 3 * (full - sum(blocks) + own_blocks)  # parameters, gradients, momentum
        now = {"held": held_bytes(model, optimizer), "bound": bound, "resident": resident_bytes()}
        # Parameters that came in one message lie in its storage, and so do the running statistics.
        assert now["held"] <= bound + statistics, now
        worst = {key: max(worst[key], now[key]) for key in worst}
        engine.after_step()
    return {"full_bytes": 3 * full, "worst_bytes_by_worker": gathered(worst)}


def check_cost(worker: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a sync for each setting of `check`, interleaved; and of the hashes and the search for NaN alone."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engines = {}
    for check in ("off", "sampled", "full"):
        torch.manual_seed(0)
        model = preact_resnet(settings["depth"], num_classes=10, width_multiplier=settings["width"]).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        engines[check] = Engine(model, [optimizer], Config(local_steps=1, check=check))  # type: ignore[arg-type]
        engines[check].start()

    def seconds_of(act: Callable[..., object], *arguments: object) -> float:
        start = time.perf_counter()
        act(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()  # a kernel is only queued when its call returns
        return time.perf_counter() - start

    def hash_all(engine: Engine, equal: Any) -> None:
        divergence = engine._handshake.divergence
        divergence.note(equal, engine.clock.round)
        divergence.numbers(Purpose.HOST)

    sync, hashes, search = defaultdict(list), defaultdict(list), []
    for _ in range(settings["turns"] + 2):  # the first two warm up
        for check, engine in engines.items():
            equal = engine.sync.replicated_tensors(engine.clock.round)
            dist.barrier()  # or one would wait for the other inside of the timed part
            sync[check].append(seconds_of(engine.after_step))
            if check != "off":
                hashes[check].append(seconds_of(hash_all, engine, equal))
            search.append(seconds_of(engine._handshake.divergence._first_not_finite))
    return {
        "device": device.type,
        "median_sync_seconds": {check: median(found[2:]) for check, found in sync.items()},
        "median_hash_seconds": {check: median(found[2:]) for check, found in hashes.items()},
        "median_search_seconds": median(search[2 * len(engines) :]),
    }


def step_time(worker: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A local step under the strategy, and in a plain loop over a network of the held blocks only; interleaved."""
    quiet()
    loader = images(settings["steps"], 32)
    seconds: dict[str, list[float]] = {"plain loop": [], "resist": []}
    for _ in range(settings["step_turns"]):
        strategy = ResISTStrategy(local_steps=NEVER, data="copy", min_blocks=1)
        net: Any = preact_resnet(settings["depth"], width_multiplier=0.25)
        seconds["resist"] += trained_seconds(strategy, net, loader)
        assert strategy.engine is not None
        alone = only_blocks(
            preact_resnet(settings["depth"], width_multiplier=0.25), strategy.engine.partition.held[worker]
        )
        seconds["plain loop"] += plain_seconds(alone, loader)
    medians = {name: median(values) for name, values in seconds.items()}
    return {"median_seconds": medians, "ratio": medians["resist"] / medians["plain loop"], "seconds": seconds}


def only_blocks(net: Any, held: Iterable[int]) -> nn.Module:
    """The paper's network with these of the partitioned blocks, as if it never had the others.

    The cost of a strategy is the difference between this network's local step and that of the sub-network.
    """
    first, *partitioned = net.section3
    net.section3 = nn.Sequential(first, *(partitioned[index] for index in held))
    return net


def overhead(worker: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A step of one process with a network so small that overhead dominates, in a plain loop and under strategies."""
    quiet()
    strategies: dict[str, Callable[[], Strategy]] = {
        "Lightning's DDP": lambda: DDPStrategy(process_group_backend="gloo"),
        "local_sgd": lambda: LocalSGDStrategy(local_steps=NEVER),
        "resist": lambda: ResISTStrategy(local_steps=NEVER),
    }
    loader = images(5 * settings["steps"], 1)
    seconds: dict[str, list[float]] = {"plain loop": [], **{name: [] for name in strategies}}
    for _ in range(settings["step_turns"] + 2):
        seconds["plain loop"] += plain_seconds(small(), loader)
        for name, make in strategies.items():
            seconds[name] += trained_seconds(make(), small(), loader)
    medians = {name: median(values) for name, values in seconds.items()}
    return {"median_seconds": medians, "n": {name: len(values) for name, values in seconds.items()}}


def small() -> nn.Module:
    return PreActResNet((1, 1, 7, 1), 10, width_multiplier=1 / 32)


def images(steps: int, batch: int, size: int = 32) -> DataLoader[Any]:
    """Random images of one class, so many batches."""
    pixels = torch.randn(steps * batch, 3, size, size)
    return DataLoader(TensorDataset(pixels, torch.zeros(len(pixels), dtype=torch.long)), batch)


def trained_seconds(strategy: Strategy, net: nn.Module, loader: DataLoader[Any]) -> list[float]:
    clock = Clock()
    quiet_trainer(strategy, dist.get_world_size(), max_epochs=1, callbacks=[clock]).fit(Module(net), loader)
    return clock.seconds()


def plain_seconds(net: nn.Module, loader: DataLoader[Any]) -> list[float]:
    """Seconds of the steps of a plain loop, as a user would write it."""
    clock, optimizer = Clock(), make_optimizer(net.train(), 0.01)
    for x, y in loader:
        clock.on_train_batch_start()
        sgd_step(net, optimizer, x, y)
    return clock.seconds()


def quiet() -> None:
    hush()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def gathered(value: Any) -> list[Any]:
    """Every worker's value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

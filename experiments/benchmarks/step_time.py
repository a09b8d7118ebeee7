"""What does the strategy cost per local step, against a plain PyTorch loop over the same sub-network?

torchrun --nproc-per-node 2 experiments/benchmarks/step_time.py

Both train worker 0's sub-network of the paper's "101" (narrow), turn and turn about in one run, so that a busy machine
disturbs both alike. Prints a table and writes experiments/benchmarks/results/step_time.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks.keep import RESULTS
from experiments.harness.record import write_record
from resist_lightning import ResISTStrategy
from resist_lightning.models import PreActResNet, preact_resnet


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net)


class Clock(L.Callback):
    """Seconds from the start of each batch to the start of the next, fetching included."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())


def make_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def make_loader(args: argparse.Namespace) -> DataLoader[Any]:
    images = torch.randn(args.steps * args.batch, 3, 32, 32)
    return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), args.batch)


def plain_seconds(args: argparse.Namespace, loader: DataLoader[Any], held: tuple[int, ...]) -> list[float]:
    """The loop that a user would write, over a network that has only the held blocks."""
    net: PreActResNet = preact_resnet(args.depth, width_multiplier=args.width)
    section = net.section3
    net.section3 = nn.Sequential(section[0], *(section[1 + index] for index in held))
    optimizer = make_optimizer(net)
    starts = []
    net.train()
    for x, y in loader:
        starts.append(time.perf_counter())
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return differences(starts)


def strategy_seconds(args: argparse.Namespace, loader: DataLoader[Any]) -> tuple[list[float], tuple[int, ...]]:
    """The same steps under the Trainer, in one round; and the blocks that this worker held."""
    clock = Clock()
    strategy = ResISTStrategy(local_steps=10**6, data="copy")
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), max_epochs=1, callbacks=[clock],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(preact_resnet(args.depth, width_multiplier=args.width)), loader)
    engine = strategy.engine
    assert engine is not None
    return differences(clock.starts), engine.partition.held[engine.collective.worker]


def differences(starts: list[float]) -> list[float]:
    return [after - before for before, after in zip(starts[1:], starts[2:], strict=False)]  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=101)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="per turn")
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loader = make_loader(args)
    seconds: dict[str, list[float]] = {"plain loop": [], "resist": []}
    for _ in range(args.turns):
        found, held = strategy_seconds(args, loader)
        seconds["resist"] += found
        seconds["plain loop"] += plain_seconds(args, loader, held)
    if os.environ["RANK"] != "0":
        return
    medians = {name: median(values) for name, values in seconds.items()}
    ratio = medians["resist"] / medians["plain loop"]
    table = Table("loop", "median seconds per local step", "ratio", title=f"{len(held)} of 22 blocks, n = {len(found)}")
    for name, value in medians.items():
        table.add_row(name, f"{value:.4f}", f"{value / medians['plain loop']:.3f}")
    Console().print(table)
    write_record(
        RESULTS / "step_time.jsonl",
        {"settings": vars(args), "median_seconds": medians, "ratio": ratio, "seconds": seconds},
    )


if __name__ == "__main__":
    main()

"""What does a strategy cost per step beside the training itself? One process, a network so small that little else is left.

python experiments/benchmarks/overhead.py

A plain PyTorch loop, Lightning's DDP and our strategies train the same network on the same batches, turn and turn about in
one run. Prints a table and writes experiments/benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from experiments.app.quiet import hush
from experiments.benchmarks.keep import RESULTS
from experiments.benchmarks.step_time import Clock, Module, differences, make_loader, make_optimizer
from experiments.harness.record import write_record
from resist_lightning import LocalSGDStrategy, ResISTStrategy
from resist_lightning.models import PreActResNet

STRATEGIES = {
    "Lightning's DDP": lambda: DDPStrategy(process_group_backend="gloo"),
    "local_sgd": lambda: LocalSGDStrategy(local_steps=10**6),
    "resist": lambda: ResISTStrategy(local_steps=10**6),
}


def network(args: argparse.Namespace) -> PreActResNet:
    return PreActResNet((1, 1, 7, 1), 10, width_multiplier=args.width)


def trainer_seconds(strategy: Strategy, args: argparse.Namespace, loader: DataLoader) -> list[float]:
    """Seconds of each step but the first two, from batch to batch."""
    clock = Clock()
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(network(args)), loader)
    return differences(clock.starts)


def plain_seconds(args: argparse.Namespace, loader: DataLoader) -> list[float]:
    net, clock = network(args).train(), Clock()
    optimizer = make_optimizer(net)
    for x, y in loader:
        clock.on_train_batch_start()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return differences(clock.starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1 / 32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="per turn")
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    hush()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    loader = make_loader(args)
    seconds: dict[str, list[float]] = {"plain loop": [], **{name: [] for name in STRATEGIES}}
    for _ in range(args.turns):
        seconds["plain loop"] += plain_seconds(args, loader)
        for name, make in STRATEGIES.items():
            seconds[name] += trainer_seconds(make(), args, loader)
    medians = {name: median(values) for name, values in seconds.items()}
    table = Table("loop", "median step", "beside the plain loop", title=f"One process, n = {len(seconds['resist'])}")
    for name, value in medians.items():
        table.add_row(name, f"{1e3 * value:.2f} ms", f"{1e3 * (value - medians['plain loop']):.2f} ms")
    Console().print(table)
    counts = {name: len(values) for name, values in seconds.items()}
    write_record(RESULTS / "overhead.jsonl", {"settings": vars(args), "median_seconds": medians, "n": counts})


if __name__ == "__main__":
    main()

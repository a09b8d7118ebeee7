"""Which batch-norm, momentum and scale policy trains best? One training per momentum policy and seed, many evaluations.

python experiments/benchmarks/policies.py digits
python experiments/benchmarks/policies.py FOLDER          (train/<class>/*, test/<class>/*, e.g. CIFAR-10 as JPEG)

Runs on the reference simulator, so any number of workers trains on one machine. Prints a table and writes
experiments/benchmarks/results/policies_*.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experiments.benchmarks.keep import RESULTS
from experiments.data.folder import ImageFolder
from experiments.data.module import ImageData
from experiments.data.sets import Digits
from experiments.harness.record import write_record
from resist_lightning import Config, Simulator
from resist_lightning.models import PreActResNet

MOMENTA = ("reset", "keep", "travel")
NORMS = ("recalibrate", "running", "batch")


def batches(data: ImageData, workers: int, epoch: int, seed: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A batch for each worker, from its shard of the epoch's order."""
    images = data.train_images
    assert images is not None
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
    size = data.loading.batch_size
    for step in range(len(order) // (size * workers)):
        parts = order[step * size * workers : (step + 1) * size * workers].view(workers, size)
        yield [data.training_transform(images.take(part)) for part in parts]


def train(data: ImageData, config: Config, args: argparse.Namespace, seed: int) -> Simulator:
    """Train with SGD, momentum 0.9, and the paper's steps of the learning rate."""
    torch.manual_seed(seed)
    assert data.train_images is not None
    channels = data.train_images.pixels.shape[1]
    model = PreActResNet(args.sections, data.num_classes, width_multiplier=args.width, in_channels=channels)

    def make_optimizer(module: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(module.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)

    simulator = Simulator(model, make_optimizer, config, args.workers)
    for epoch in range(args.epochs):
        rate = args.lr * (1 if epoch < args.epochs * 0.5 else 0.1 if epoch < args.epochs * 0.75 else 0.01)
        for step in batches(data, args.workers, epoch, seed):
            for worker, (x, y) in zip(simulator.workers, step, strict=True):
                (optimizer,) = worker.optimizers
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                nn.functional.cross_entropy(worker.module.train()(x), y).backward()
                optimizer.step()
            simulator.after_step()
    return simulator


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """Test accuracy in per cent."""
    model.eval()
    right = [(model(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader()]
    assert data.test_images is not None
    return 100 * sum(right) / len(data.test_images.labels)


def measure(data: ImageData, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per policy and scale, with the accuracy of every seed."""
    rows: list[dict[str, Any]] = []
    for momentum in MOMENTA:
        found: dict[tuple[str, str], list[float]] = {}
        for seed in range(args.seeds):
            config = Config(local_steps=args.local_steps, min_blocks=args.min_blocks, seed=seed, momentum=momentum)
            started = time.perf_counter()
            simulator = train(data, config, args, seed)
            scales = {"held share": simulator.scale, "1/S": 1 / args.workers, "none": 1.0}
            for norm, (label, scale) in product(NORMS, scales.items()):
                found.setdefault((norm, label), []).append(accuracy(simulator.full_model(norm, scale), data))
            Console().print(f"{momentum}, seed {seed}: {time.perf_counter() - started:.0f} s")
        rows += [
            {"momentum": momentum, "batch_norm": norm, "scale": label, "test_accuracy": values}
            for (norm, label), values in found.items()
        ]
    return rows


def show(rows: list[dict[str, Any]]) -> Table:
    """Mean and spread over seeds."""
    table = Table("momentum", "batch norm", "test-time scale", "test accuracy, % (mean ± sd)", title="Policies")
    for row in rows:
        values = row["test_accuracy"]
        table.add_row(row["momentum"], row["batch_norm"], row["scale"], f"{mean(values):.2f} ± {pstdev(values):.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="digits, or a folder with train/ and test/")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--min-blocks", type=int, default=None)
    parser.add_argument("--sections", type=int, nargs=4, default=(1, 1, 7, 1))
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=None, help="training images per class")
    parser.add_argument("--limit-test", type=int, default=None, help="test images per class")
    parser.add_argument("--cache-dir", default="runs/cache", help="where decoded images are kept")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than free cores is slower by far")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loading = {"batch_size": args.batch, "limit": args.limit, "limit_test": args.limit_test, "holdout": 0.02}
    digits = args.data == "digits"
    data = Digits(**loading) if digits else ImageFolder(args.data, cache_dir=args.cache_dir, **loading)
    for stage in ("fit", "test"):
        data.setup(stage)
    rows = measure(data, args)
    Console().print(show(rows))
    name = "digits" if digits else "image_folder"
    settings = {**vars(args), "data": name}
    write_record(RESULTS / f"policies_{name}.jsonl", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

"""The cost of an evaluation for the training: on all workers, on the first, or in a process beside them.

python experiments/benchmarks/evaluations.py                         (a minute and a half on two free cores)
python experiments/benchmarks/evaluations.py size=smoke out=FOLDER   (to see that it works)

Real processes under the Trainer, one thread each: a training of the demo's network on random images, evaluated after
every second round. Interleaved in one run: without evaluations, on all workers, on worker 0 alone, and by an evaluator,
for which the workers save checkpoints. CPU seconds are counted, in each round those of the slowest worker, for which
the others wait: the time of a training in which each worker has a core, and links and disks take no time. So the
numbers do not depend on other load of the machine. Lost time is the difference to the training without evaluations of
the same turn. The evaluator follows the checkpoints afterwards, to be measured too; it needs a core of its own, or as
much of the workers'. Writes experiments/benchmarks/results/evaluations.jsonl.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks import tables
from experiments.benchmarks.steps import quiet
from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show_and_write
from experiments.harness.workers import forked
from experiments.trainers import Module, quiet_trainer
from resist_lightning import ResISTStrategy
from resist_lightning.callbacks import EndMarker
from resist_lightning.evaluator import CheckpointEvaluator
from resist_lightning.models import preact_resnet

EVERY = 2  # rounds between two evaluations
WAYS = ("none", *tables.EVALUATED)


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/benchmarks")
    workers: int = option(2, "processes", least=2)
    turns: int = option(3, "trainings of each kind", least=1, smoke=1)
    evaluations: int = option(3, "evaluations per training", least=1, smoke=1)
    local_steps: int = option(12, "per round", least=1, smoke=2)
    depth: int = option(38, "depth of the network", least=26, smoke=26)
    width: float = option(0.25, "1.0 is the paper's", above=0, smoke=1 / 16)
    batch: int = option(16, "images", least=2, smoke=4)
    examples: int = option(768, "images per evaluation", least=2, smoke=16)
    image: int = option(16, "pixels", least=8, smoke=8)


class Net(Module):
    """Notes the start of each round, after the sync and the evaluation, by this process's CPU clock."""

    def __init__(self, options: Options) -> None:
        super().__init__(preact_resnet(options.depth, width_multiplier=options.width))
        self.local_steps = options.local_steps
        self.begun: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx % self.local_steps == 0:
            self.begun.append(time.process_time())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)


class Watch(L.Callback):
    """CPU seconds of each evaluation on this worker, from the assembly of the full model until it is left."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_validation_start(self, *_: Any) -> None:
        self._start = time.process_time()

    def on_validation_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def images(count: int, options: Options) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, options.image, options.image)
    labels = torch.randint(10, (count,), generator=generator)
    return DataLoader(TensorDataset(torch.randn(shape, generator=generator), labels), options.batch)


def train(worker: int, task: tuple[str, str, Options]) -> dict[str, Any]:
    """A worker's part in one training."""
    way, folder, options = task
    quiet()
    torch.manual_seed(0)
    every = EVERY * options.local_steps
    batches = every * options.evaluations + options.local_steps  # one more round: the last evaluation ends before it
    watch = Watch()
    callbacks: list[L.Callback] = [watch]
    if way == "evaluator":
        callbacks += [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1), EndMarker()]
    module = Net(options)
    trainer = quiet_trainer(
        ResISTStrategy(local_steps=options.local_steps, min_blocks=1, evaluate_on="first" if way == "first" else "all"),
        options.workers,
        max_epochs=1,
        callbacks=callbacks,
        enable_checkpointing=len(callbacks) > 1,
        val_check_interval=every,
        limit_val_batches=1.0 if way in ("all", "first") else 0,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, images(batches * options.batch * options.workers, options), images(options.examples, options))
    return {"rounds": [after - before for before, after in pairwise(module.begun)], "evaluated": watch.seconds}


def follow(_: int, task: tuple[str, Options]) -> list[float]:
    """Run the evaluator; returns its mean CPU seconds for each evaluation, with the loading of the file."""
    folder, options = task
    quiet()
    started = time.process_time()
    evaluator = CheckpointEvaluator(quiet_trainer("auto"), monitor="val/loss", silence=60, poll_seconds=0.05)
    found = evaluator.follow(Net(options), folder, images(options.examples, options))
    return [(time.process_time() - started) / len(found)] * len(found)


def measure(way: str, turn: int, options: Options) -> dict[str, Any]:
    """A row: a training, and its evaluator's work."""
    with tempfile.TemporaryDirectory() as folder:
        found = forked(train, (way, folder, options), options.workers)
        by_worker = [worker["rounds"] for worker in found]
        row = {
            "way": way,
            "turn": turn,
            "seconds": sum(map(max, zip(*by_worker, strict=True))),
            "evaluated": [worker["evaluated"] for worker in found],
        }
        if way == "evaluator":
            row["evaluated"] = forked(follow, (folder, options), 1, grouped=False)
    return row


def run(_: Sequence[str], options: Options) -> None:
    rows = []
    for turn in range(options.turns):
        for way in WAYS:
            rows.append(measure(way, turn, options))
            print(f"measured: {way}, turn {turn}: {rows[-1]['seconds']:.2f} s", flush=True)
    settings = options.take(
        "workers", "evaluations", "local_steps", "depth", "width", "batch", "examples", "image", "turns"
    )
    out = Path(options.out)
    write_record(out / "evaluations.jsonl", {"settings": {**settings, "every": EVERY}, "rows": rows})
    show_and_write(out, tables.RESULTS, tables.STUDIES, ["evaluations"], [])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))

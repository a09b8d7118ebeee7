"""Trains a network of the zoo on two workers with default settings, and measures all that a user is promised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from resist_lightning import Config, ResISTStrategy, Simulator
from resist_lightning.methods.resist.layout import BlockLayout
from tests.helpers import zoo
from tests.helpers.trainers import make_trainer, run_trainers
from tests.helpers.training import clone_state
from tests.helpers.zoo_branches import branches_differ

WORKERS, HELD_OUT = 2, 2


class Length(NamedTuple):
    """The length of a training: both its end and the checkpoint to resume from lie in the middle of a round."""

    local_steps: int
    steps: int
    middle: int  # the step of the checkpoint


LONG, SHORT = Length(5, 12, 7), Length(3, 7, 4)
ROUNDS = 40
"""Number of rounds over which the share that a worker holds is averaged."""


class Trainee(L.LightningModule):
    """A network of the zoo, trained by SGD; random numbers are seeded by worker and step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.net = name, zoo.build(name)

    def training_step(self, batch: zoo.Batch, _: int) -> Tensor:
        torch.manual_seed(batch["seed"])
        return zoo.loss_of(self.name, self.net, batch)

    def validation_step(self, batch: zoo.Batch, _: int) -> None:
        self.log("loss", zoo.loss_of(self.name, self.net, batch), sync_dist=True, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=zoo.NETWORKS[self.name].rate, momentum=0.9, weight_decay=1e-4)


class Batches(Dataset[Any]):
    """A worker's batches, by number."""

    def __init__(self, name: str, worker: int, count: int) -> None:
        self.name, self.worker, self.count = name, worker, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> zoo.Batch:
        return {**zoo.batch_of(self.name, self.worker, step), "seed": 1000 * self.worker + step}


def loader(name: str, worker: int, count: int) -> DataLoader[Any]:
    return DataLoader(Batches(name, worker, count), batch_size=None)


@dataclass(frozen=True)
class Found:
    """The results of a training.

    Args:
        blocks: names of the blocks by default.
        hooked: the blocks whose scale is not in the checkpoint's weights.
        branches: largest deviation of a scaled block from its reference, relative to the effect of the scale.
        held: share of the parameters that a worker holds, mean over workers and rounds.
        reported: validation loss of the full model.
        plain: the same loss with the checkpoint loaded into the plain network.
        unscaled: the same loss if the checkpoint's weights were not scaled.
        unlike: largest deviation of a tensor from the simulator's, relative to the tensor.
        resumed: whether resuming from the checkpoint in mid-round gave the same weights, bit for bit.
    """

    blocks: tuple[str, ...]
    hooked: tuple[str, ...]
    branches: float
    held: float
    reported: float
    plain: float
    unscaled: float
    unlike: float
    resumed: bool

    @property
    def difference(self) -> float:
        """Difference of the two losses, relative to their size."""
        return abs(self.reported - self.plain) / max(1.0, abs(self.plain))


def examine(name: str, length: Length = LONG) -> Found:
    """Train a network by real processes, by the simulator, and from a checkpoint in mid-round."""
    with TemporaryDirectory() as folder:
        results = run_trainers(_train, WORKERS, name, folder, length, timeout=400)
        saved = torch.load(f"{folder}/end.ckpt", weights_only=False)
    own = saved["resist_lightning"]
    trained, unscaled = Trainee(name), Trainee(name)
    trained.load_state_dict(saved["state_dict"])
    factors = {
        **dict.fromkeys(own["folded"] if own["scale"] != 1 else (), own["scale"]),
        **dict.fromkeys(own["divided"] if own["scale"] != 1 else (), 1 / own["scale"]),
    }
    unscaled.load_state_dict({key: value / factors.get(key, 1) for key, value in saved["state_dict"].items()})
    layout = BlockLayout(Trainee(name), Config(), WORKERS)
    return Found(
        blocks=tuple(block.name for block in layout.blocks),
        hooked=tuple(own["hooked"]) if own["scale"] != 1 else (),
        branches=branches_differ(name, layout.module.net, layout.blocks),
        held=fmean(held_shares(layout)),
        reported=results[0][0],
        plain=_evaluate(trained),
        unscaled=_evaluate(unscaled),
        unlike=_deviation(clone_state(trained), _simulate(name, length)),
        resumed=all(resumed for _, resumed in results),
    )


def held_shares(layout: BlockLayout) -> list[float]:
    """Share of the parameters that a worker holds, for each worker and round."""
    total = sum(parameter.numel() for parameter in layout.module.parameters())
    return [count / total for round in range(ROUNDS) for count in layout.held_parameters(round)]


def _train(worker: int, name: str, folder: str, length: Length) -> tuple[float, bool]:
    """A worker's training; returns the loss reported at its end, and whether resuming gives the same weights."""
    module = Trainee(name)
    middle = ModelCheckpoint(f"{folder}/middle", every_n_train_steps=length.middle, save_top_k=-1, filename="{step}")
    trainer = _trainer(length, enable_checkpointing=True, callbacks=[middle])
    trainer.fit(module, loader(name, worker, length.steps))
    trainer.save_checkpoint(f"{folder}/end.ckpt")
    reported = trainer.validate(module, loader(name, 100 + worker, HELD_OUT), verbose=False)[0]["loss"]
    again = Trainee(name)
    path = Path(folder) / "middle" / f"step={length.middle}.ckpt"
    _trainer(length).fit(again, loader(name, worker, length.steps), ckpt_path=path, weights_only=False)
    expected, actual = clone_state(module), clone_state(again)
    same = all(torch.equal(actual[key], value) for key, value in expected.items())
    return reported, same and actual.keys() == expected.keys()


def _trainer(length: Length, **options: Any) -> L.Trainer:
    return make_trainer(ResISTStrategy(local_steps=length.local_steps), max_epochs=1, **options)


def _simulate(name: str, length: Length) -> dict[str, Tensor]:
    config = Config(local_steps=length.local_steps)
    simulator = Simulator(Trainee(name), lambda copy: copy.configure_optimizers(), config, WORKERS)
    for step in range(length.steps):
        for number, worker in enumerate(simulator.workers):
            worker.module.train()
            worker.optimizers[0].zero_grad()
            worker.module.training_step(Batches(name, number, length.steps)[step], step).backward()
            worker.optimizers[0].step()
        simulator.after_step()
    return clone_state(simulator.full_model())


@torch.no_grad()
def _evaluate(module: nn.Module) -> float:
    module.eval()
    losses = []
    for worker in range(WORKERS):
        for step in range(HELD_OUT):
            batch = zoo.batch_of(module.name, 100 + worker, step)
            losses.append(zoo.loss_of(module.name, module.net, batch).item())
    return sum(losses) / len(losses)


def _deviation(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    deviations = [0.0]
    for name, value in expected.items():
        size = max(float(value.double().abs().max()), 1e-3) if value.numel() else 1.0
        if value.numel():
            deviations.append(float((actual[name].double() - value.double()).abs().max()) / size)
    return max(deviations)

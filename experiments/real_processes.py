"""Trains a network in two processes over TCP and by a simulation, and compares the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from experiments.harness.tables import Grid, Rows
from experiments.harness.workers import forked
from experiments.trainers import Recipe, Stream, Trainer, differences, set_rate, sgd_step, train
from resist_lightning import Config, Engine

WORKERS = 2


@dataclass(frozen=True)
class Training:
    """The training of both: the same network on the same examples."""

    network: nn.Module
    config: Config | None  # None is torch's DistributedDataParallel
    stream: Callable[[], Stream[Any]]  # the examples from their beginning
    recipe: Recipe
    rates: Sequence[float]  # of each local step


def compare(training: Training, simulation: Trainer, evaluate: Callable[[nn.Module], float]) -> dict[str, Any]:
    """Train in real processes and in the simulation: a row of a record. Forks: call it before anything is computed."""
    network = training.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with TemporaryDirectory() as folder:
        place = Path(folder) / "model.pt"
        forked(_train, (place, training, training.stream()), WORKERS)
        real = torch.load(place, weights_only=True)
    simulated = train(simulation, training.stream(), WORKERS, training.rates).full_model()
    network.load_state_dict(real)
    return {
        "local_steps": len(training.rates),
        **differences(simulated.state_dict(), real, before),
        "test_simulated": evaluate(simulated),
        "test_real": evaluate(network),
    }


def agreement(rows: Rows, named: Callable[[dict[str, Any]], str], measure: str, digits: int) -> Grid:
    """The table of rows of `compare`; ``named`` describes a case, and ``measure`` names the evaluated quantity."""
    return Grid.of("Real processes against the simulator", rows, {
        "": lambda row: f"{named(row['case'])}, S = {row['case']['workers']}",
        "local steps": lambda row: row["local_steps"],
        "tensors equal bit for bit": lambda row: f"{row['equal_tensors']} of {row['tensors']}",
        "largest difference": lambda row: f"{row['largest_difference']:.1e}",
        "largest change by training": lambda row: f"{row['largest_change_by_training']:.1e}",
        f"simulator, {measure}": lambda row: f"{row['test_simulated']:.{digits}f}",
        f"real processes, {measure}": lambda row: f"{row['test_real']:.{digits}f}",
    })  # fmt: skip


def _train(worker: int, task: tuple[Path, Training, Stream[Any]]) -> None:
    """A real worker: a plain loop, as a user would write it."""
    place, training, stream = task
    model, recipe = training.network, training.recipe
    optimizer = recipe.optimizer(model, training.rates[0])
    trained = model if training.config else DistributedDataParallel(model)
    engine = Engine(model, [optimizer], training.config) if training.config else None
    if engine:
        engine.start()
    for step, lr in enumerate(training.rates):
        x, y = stream.batch(step, worker, WORKERS)
        trained.train()
        set_rate(optimizer, lr)
        sgd_step(trained, optimizer, x, y, recipe)
        if engine:
            engine.after_step()
    if engine:
        engine.finish()
    if worker == 0:
        torch.save(model.state_dict(), place)

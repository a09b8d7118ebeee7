"""A worker of `run.py`: trains on random examples for as long as is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from experiments.app.quiet import hush
from experiments.benchmarks.step_time import Module
from experiments.harness.links.crew import Place
from experiments.links.measure import Window
from experiments.links.methods import make_strategy, make_trainer
from experiments.links.networks import fully_connected, make_network

IMAGE, CLASSES = (3, 32, 32), 10
"""CIFAR's."""
FEATURES, WORDS = 4096, 35
"""Those of Speech Commands, as IST's paper has it."""


def examples(shape: tuple[int, ...], classes: int, count: int, settings: dict[str, Any]) -> DataLoader[Any]:
    """Random examples, the same for every method; Lightning gives each worker its part."""
    generator = torch.Generator().manual_seed(settings["seed"])
    values = torch.randn(count, *shape, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return DataLoader(TensorDataset(values, labels), settings["batch"])


def window_of(method: str, settings: dict[str, int]) -> tuple[int, int, int]:
    """First and last step of the window, and DDP's silent steps before it."""
    per_round, rounds = settings["steps_per_round"], settings["rounds"]
    if method == "ddp":
        silent = per_round + 1
        opens = silent + 1  # one step with sync: DDP arranges its buckets
        return opens, opens + settings["ddp_steps"] - 1, silent
    return per_round, per_round * (rounds + 1) - 1, 0


def main(place: Place, settings: dict[str, Any]) -> None:
    hush()
    torch.manual_seed(settings["seed"])
    method, network = settings["method"], settings["network"]
    opens, closes, silent = window_of(method, settings)
    strategy = make_strategy(
        method,
        local_steps=settings["steps_per_round"],
        min_blocks=settings["min_blocks"],
        seed=settings["seed"],
        timeout=settings["timeout_seconds"],
        neurons=fully_connected(network),
    )
    window = Window(place, opens, closes, silent)
    trainer = make_trainer(strategy, place.workers, max_epochs=1, max_steps=closes + 1, callbacks=[window])
    shape, classes = ((FEATURES,), WORDS) if fully_connected(network) else (IMAGE, CLASSES)
    module = Module(make_network(network, num_classes=classes, in_features=FEATURES))
    trainer.fit(module, examples(shape, classes, (closes + 1) * settings["batch"] * place.workers, settings))
    place.report(window.result)

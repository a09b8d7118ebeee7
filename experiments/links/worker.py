"""A worker of `run.py`: trains on random images for as long as is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks.step_time import Module
from experiments.links.crew import Place
from experiments.links.measure import Window
from experiments.links.methods import make_strategy, make_trainer
from experiments.quiet import hush
from resist_lightning.models import preact_resnet


def images(count: int, batch: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Random images of CIFAR's size, the same for every method; Lightning gives each worker its part."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.randint(10, (count,), generator=generator)), batch)


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
    )
    window = Window(place, opens, closes, silent)
    trainer = make_trainer(strategy, place.workers, max_epochs=1, max_steps=closes + 1, callbacks=[window])
    module = Module(preact_resnet(network["depth"], width_multiplier=network["width_multiplier"]))
    trainer.fit(module, images((closes + 1) * settings["batch"] * place.workers, settings["batch"], settings["seed"]))
    place.report(window.result)

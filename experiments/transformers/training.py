"""Trains one case on one of the two tasks: the same examples in the same order, and the same recipe, for all methods."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.accuracy.training import prepared as prepared_images
from experiments.trainers import Batches, DataParallel, Prepared, Recipe, Simulated, Trainer, steps_of, train
from experiments.transformers.cases import RATES_SEED, Case, config_of
from experiments.transformers.networks import LanguageModel, vit
from experiments.transformers.text import VOCABULARY, Windows, baselines, windows
from resist_lightning import Simulator
from resist_lightning.comm.byte_formulas import ddp_bytes
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.transfers import plan_sync
from resist_lightning.state.optimizer_state import OptimizerStates

EVALUATED = 64  # sequences of an evaluation step


@dataclass(frozen=True)
class AdamW(Recipe):
    """AdamW under one cycle: up for a fifth of the steps, then down to 0 on half a cosine."""

    schedule: str = "one_cycle"

    def optimizer(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:  # type: ignore[override]
        """Short memories of gradients and squares, as is usual for transformers."""
        return torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean over all labels of the batch: one of each image, one of each position."""
        return functional.cross_entropy(output.flatten(0, -2), labels.flatten())


RECIPE = AdamW()


@lru_cache(maxsize=1)
def prepared_text(context: int, evaluated: int | None) -> Prepared:
    """The text, of whose hold-out and test the first ``evaluated`` windows are used."""

    def pairs(batch: Windows) -> tuple[Tensor, Tensor]:
        return batch.codes.long(), batch.labels.long()

    parts = {"train": windows("train", context)}
    parts |= {name: windows(name, context, evaluated) for name in ("val", "test")}
    return Prepared.made(parts, pairs, pairs, EVALUATED)


def prepared(case: Case, options: Any) -> Prepared:
    """The examples of a case."""
    return prepared_images(options) if case.images else prepared_text(options.context, options.evaluated)


def make_network(case: Case, options: Any) -> nn.Module:
    """The network of a case, with the same weights for all methods of one seed."""
    torch.manual_seed(case.seed)
    size = options.take("width", "depth", "heads")
    if not case.images:
        return LanguageModel(VOCABULARY, options.context, **size)
    _, channels, _, pixels = prepared_images(options).examples.pixels.shape
    return vit(pixels, channels, **size)


def make_trainer(case: Case, options: Any) -> Trainer:
    """The trainer of ``case``."""
    network = make_network(case, options)
    if not case.syncs:
        return DataParallel(network, RECIPE.optimizer(network, case.lr), case.workers, RECIPE)
    config = config_of(case, options)
    steps = steps_of(samples_of(case, options), options.batch, case.workers)
    simulator = Simulator(network, lambda copied: RECIPE.optimizer(copied, case.lr), config, case.workers, steps)
    return Simulated(simulator, RECIPE)


def samples_of(case: Case, options: Any) -> int:
    """Images or windows that all workers of a case see together."""
    if case.seed == RATES_SEED:
        return int(options.rate_samples)
    return int(options.image_samples if case.images else options.samples)


def measure(case: Case, options: Any) -> dict[str, Any]:
    """Train and evaluate ``case``: a row of a record; bits per byte, or accuracies in per cent."""
    started, data = time.process_time(), prepared(case, options)
    steps = steps_of(samples_of(case, options), options.batch, case.workers)
    stream = data.stream(options.batch, case.seed)
    trainer = train(make_trainer(case, options), stream, case.workers, RECIPE.rates(case.lr, steps))
    model = trainer.full_model()
    return {
        **(
            data.accuracies(model)
            if case.images
            else {"holdout": bits(model, data.holdout), "test": bits(model, data.test)}
        ),
        **costs(case, options, steps),
        "local_steps_done": steps,
        "samples": steps * case.workers * options.batch,
        **({} if case.images else {"baselines": baselines()}),
        "core_seconds": round(time.process_time() - started, 1),
    }


@torch.no_grad()
def bits(model: nn.Module, batches: Batches) -> float:
    """Cross entropy in bits per byte."""
    model.eval()
    total = sum(float(RECIPE.loss(model(x), y)) * y.numel() for x, y in batches)
    return total / sum(y.numel() for _, y in batches) / math.log(2)


def costs(case: Case, options: Any, steps: int) -> dict[str, Any]:
    """Parameters in a worker and bytes that it sends in the training by closed form: means over workers."""
    network = make_network(case, options)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if not case.syncs:
        return {
            "parameters": parameters,
            "held": parameters,
            "sent_bytes": ddp_bytes(4 * parameters, case.workers, steps),
        }
    layout = BlockLayout(network, config_of(case, options), case.workers)
    layout.plan_end(Clock(options.local_steps), steps)
    rounds = steps // options.local_steps
    sizes = layout.sizes(OptimizerStates([RECIPE.optimizer(network, case.lr)]))
    partitions = [layout.partition(number) for number in range(rounds + 2)]
    plans = [plan_sync(*pair) for pair in zip(partitions[:-1], partitions[1:], strict=True)]
    sent = 0
    for plan, following in zip(plans[:-1], plans[1:], strict=True):
        sent += sum(sum(kinds.values()) for kinds in sync_bytes(plan, sizes, case.workers, following))
    held = mean(mean(layout.held_parameters(number)) for number in range(max(1, rounds)))
    return {"parameters": parameters, "held": held, "sent_bytes": sent / case.workers}

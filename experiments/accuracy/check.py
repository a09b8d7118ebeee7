"""Compares the weights of two gloo workers over TCP with those of the simulator, on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from experiments.accuracy.cases import Case, base, config_of, make_network
from experiments.accuracy.training import make_trainer, prepared, recipe_of
from experiments.real_processes import WORKERS, Training, compare
from experiments.trainers import accuracy, steps_of


def cases(options: Any) -> list[Case]:
    """A case for each method that communicates."""
    return [base(method, WORKERS, 0, options) for method in ("resist", "local_sgd", "ddp")]


def compared(cases: Sequence[Case], options: Any) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Train cases in real processes and in the simulator, on the same images, and compare the full models."""
    torch.set_num_threads(1)
    for case in cases:
        data = prepared(options)
        recipe = recipe_of(case, options)
        rates = recipe.rates(case.lr, steps_of(options.check_samples, options.batch, WORKERS))
        network = make_network(case, options, data.examples.pixels.shape[1])
        config = None if case.method == "ddp" else config_of(case, options)
        training = Training(network, config, partial(data.stream, options.batch, case.seed), recipe, rates)
        yield case, compare(training, make_trainer(case, options), partial(accuracy, batches=data.test))

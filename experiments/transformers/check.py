"""Compares the weights of two gloo workers over TCP with those of the simulator, on the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from experiments.real_processes import WORKERS, Training, compare
from experiments.trainers import steps_of
from experiments.transformers.cases import Case, config_of
from experiments.transformers.training import RECIPE, bits, make_network, make_trainer, prepared


def cases(options: Any) -> list[Case]:
    """A case for each kind of communication: state that travels, an outer step, gradients."""
    return [
        Case("resist", WORKERS, 0, options.lr, "travel"),
        Case("diloco", WORKERS, 0, options.lr, "keep"),
        Case("ddp", WORKERS, 0, options.lr),
    ]


def compared(cases: Sequence[Case], options: Any) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Train cases in real processes and in the simulator, and compare the full models."""
    torch.set_num_threads(1)
    for case in cases:
        data = prepared(case, options)
        steps = steps_of(options.check_samples, options.batch, WORKERS)
        config = config_of(case, options) if case.syncs else None
        stream = partial(data.stream, options.batch, case.seed)
        training = Training(make_network(case, options), config, stream, RECIPE, RECIPE.rates(case.lr, steps))
        yield case, compare(training, make_trainer(case, options), partial(bits, batches=data.test))

"""Tasks and cases of the accuracy study: a case is one training of a task; the tables choose among all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.harness.study import Case as AnyCase

LOCAL_STEPS = 20  # the authors' code; its curves show 20, 40 and 60
LENGTHS = (5, 10, 20, 40, 80)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
ABLATED = 4  # workers of the ablations
# Shares of the neurons that a worker holds, and last rounds with all of them: in all rounds half; a quarter, then half.
HOLDERS = (("0.5", 0), ("0.25, 0.5", 0), ("0.5", 1), ("0.5", 2))
RATES_SEED = 1000  # learning rates are judged on the hold-out, with a seed that no other table uses


@dataclass(frozen=True)
class Task:
    """A data set, and the network that learns it; some values are by size of the study."""

    title: str  # in words
    depth: int  # linear layers
    width: dict[str, int]  # neurons of a hidden layer, by size
    batch: int  # examples per local step of one worker
    passes: dict[str, int]  # over the training examples, of all workers together, by size
    lr: float  # initial learning rate of all methods: the best of `RATES` on the hold-out, with four workers


TASKS = {
    "digits": Task(
        "digits of scikit-learn, 64 inputs", 3, {"full": 256, "smoke": 16}, 16, {"full": 48, "smoke": 8}, lr=0.1
    ),
    "speech_shaped": Task(
        "made task of the shape of Speech Commands, 4096 inputs, 35 classes",
        3, {"full": 1024, "smoke": 16}, 32, {"full": 8, "smoke": 16}, lr=0.2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case(AnyCase):
    """A training of the accuracy study."""

    task: str  # one of `TASKS`
    method: str  # single, ddp, local_sgd or ist
    workers: int  # number of workers
    seed: int  # of weights, order, augmentation and partitions
    lr: float  # learning rate at the start
    local_steps: int = 0  # local steps per round; 0 where there are no rounds
    momentum: str = "reset"  # policy at a sync
    sgd_momentum: float = 0.0  # of the optimizer; the paper's has none
    norm: str = "batch"  # after the hidden layers: batch, layer or none
    output_norm: bool = False  # a batch norm without parameters on the outputs
    # constant (the paper's) or multistep (a tenth after half of the steps, a hundredth after three quarters)
    schedule: str = "constant"
    finish: bool = False  # whether the last tenth of the steps is a second training, local SGD on the full model
    shares: str = ""  # of the neurons, that a worker holds at least: one in all rounds, or several in turn
    finish_rounds: int = 0  # last rounds with all neurons on all workers


def base(task: str, method: str, workers: int, seed: int) -> Case:
    """The case of the main table."""
    steps = LOCAL_STEPS if method in ("local_sgd", "ist") else 0
    return Case(task, method, workers, seed, TASKS[task].lr, steps)


def rate_of(task: str, sgd_momentum: float) -> float:
    """The task's learning rate; with momentum m, which makes steps 1 / (1 - m) times as long, that much less."""
    return round(TASKS[task].lr * (1 - sgd_momentum), 6)


def cases(options: Any) -> list[Case]:
    """Every training of the study, once."""
    found: list[Case] = []
    for task in options.tasks:
        for seed in range(options.seeds):
            found += _main(task, seed, options.workers)
        for seed in range(options.ablation_seeds):
            found += _ablations(base(task, "ist", ABLATED, seed), options.lengths)
        found += [
            replace(base(task, *which, RATES_SEED), lr=lr) for which in _methods([ABLATED]) for lr in options.rates
        ]
    return list(dict.fromkeys(found))  # the main table's cases are those of an ablation too


def _methods(workers: list[int]) -> list[tuple[str, int]]:
    return [("single", 1), *((method, count) for count in workers for method in ("ddp", "local_sgd", "ist"))]


def _main(task: str, seed: int, workers: list[int]) -> Iterator[Case]:
    """All methods on equal samples; and IST with a finish, and with several holders for each neuron."""
    for method, count in _methods(workers):
        yield base(task, method, count, seed)
        if method == "ist":
            yield replace(base(task, method, count, seed), finish=True)
            # With two workers each has half of the neurons anyway.
            for shares, last in HOLDERS if count > 2 else ():
                yield replace(base(task, method, count, seed), shares=shares, finish_rounds=last)


def _ablations(usual: Case, lengths: list[int]) -> Iterator[Case]:
    """One setting changed at a time; beside IST local SGD, where it has the setting too."""
    for case in (usual, replace(usual, method="local_sgd")):
        yield from (replace(case, local_steps=steps) for steps in lengths)
        yield replace(case, schedule="multistep")
        for norm in ("batch", "layer", "none"):
            yield from (replace(case, norm=norm, output_norm=output) for output in (False, True))
    rate = rate_of(usual.task, 0.9)
    yield from (replace(usual, lr=rate, sgd_momentum=0.9, momentum=policy) for policy in ("reset", "keep", "travel"))

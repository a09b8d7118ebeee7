"""What is trained in the accuracy study: a case is one training; the tables choose among all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig

from experiments.ist.tasks import TASKS

LOCAL_STEPS = 20
"""The authors' code; its curves show 20, 40 and 60."""
LENGTHS = (5, 10, 20, 40, 80)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
ABLATED = 4
"""Workers of the ablations."""
RATES_SEED = 1000
"""Learning rates are judged on the hold-out, with a seed that no other table uses."""


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        task: one of `tasks.TASKS`.
        method: single, ddp, local_sgd or ist.
        workers: number of workers.
        seed: of weights, order, augmentation and partitions.
        lr: learning rate at the start.
        local_steps: local steps per round; 0 where there are no rounds.
        momentum: policy at a sync.
        sgd_momentum: of the optimizer; the paper's has none.
        norm: after the hidden layers: batch, layer or none.
        output_norm: a batch norm without parameters on the outputs.
        schedule: constant (the paper's) or multistep (a tenth after half of the steps, a hundredth after three
            quarters).
        finish: whether the last tenth of the steps is local SGD on the full model.
    """

    task: str
    method: str
    workers: int
    seed: int
    lr: float
    local_steps: int = 0
    momentum: str = "reset"
    sgd_momentum: float = 0.0
    norm: str = "batch"
    output_norm: bool = False
    schedule: str = "constant"
    finish: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """All settings of the case, as they stand in a record."""
        return asdict(self)

    @property
    def name(self) -> str:
        """For progress lines: what differs from the main table."""
        usual = replace(base(self.task, self.method, self.workers, self.seed))
        other = [f"{key}={value}" for key, value in self.key.items() if value != usual.key[key]]
        return " ".join([self.task, self.method, f"S={self.workers}", f"seed {self.seed}", *other])


def base(task: str, method: str, workers: int, seed: int) -> Case:
    """The case of the main table."""
    steps = LOCAL_STEPS if method in ("local_sgd", "ist") else 0
    return Case(task, method, workers, seed, TASKS[task].lr[method], steps)


def rate_of(task: str, method: str, sgd_momentum: float) -> float:
    """The task's learning rate; with momentum m, which makes steps 1 / (1 - m) times as long, that much less."""
    return round(TASKS[task].lr[method] * (1 - sgd_momentum), 6)


def cases(cfg: DictConfig) -> list[Case]:
    """Every training of the study, once."""
    found: list[Case] = []
    for task in cfg.tasks:
        for seed in range(cfg.seeds):
            found += _main(task, seed, list(cfg.workers))
        for seed in range(cfg.ablation_seeds):
            found += _ablations(base(task, "ist", ABLATED, seed))
        found += [replace(base(task, *which, RATES_SEED), lr=lr) for which in _methods([ABLATED]) for lr in RATES]
    return list(dict.fromkeys(found))


def _methods(workers: list[int]) -> list[tuple[str, int]]:
    return [("single", 1), *((method, count) for count in workers for method in ("ddp", "local_sgd", "ist"))]


def _main(task: str, seed: int, workers: list[int]) -> Iterator[Case]:
    """All methods on equal samples; and IST with a finish."""
    for method, count in _methods(workers):
        yield base(task, method, count, seed)
        if method == "ist":
            yield replace(base(task, method, count, seed), finish=True)


def _ablations(usual: Case) -> Iterator[Case]:
    """One thing changed at a time; where local SGD has it too, beside it."""
    for case in (usual, replace(usual, method="local_sgd")):
        yield from (replace(case, local_steps=steps) for steps in LENGTHS)
        yield replace(case, schedule="multistep")
        yield from (replace(case, norm=norm, output_norm=output) for norm in ("batch", "layer", "none") for output in (
            False, True,
        ))  # fmt: skip
    rate = rate_of(usual.task, usual.method, 0.9)
    yield from (replace(usual, lr=rate, sgd_momentum=0.9, momentum=policy) for policy in ("reset", "keep", "travel"))

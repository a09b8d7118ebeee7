"""The cases of each study: a case is one training, and a study makes one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from experiments.harness.study import Case as AnyCase
from resist_lightning import Config

TITLES = {
    "single": "one process", "ddp": "DDP", "local_sgd": "local SGD", "diloco": "DiLoCo",
    "resist": "ResIST", "resist_outer": "ResIST, outer step",
}  # fmt: skip
PARTITIONING = ("resist", "resist_outer")
OUTER = ("diloco", "resist_outer")
BLOCKS = "blocks.[!0]*"  # all but the first: what `resist` chooses by default, but in very small networks
RATES_SEED = 1000  # no other study uses it
# What happens to Adam's state at a sync, by method; DiLoCo's paper keeps it.
POLICIES = {
    "local_sgd": ("reset", "keep"), "diloco": ("keep",), "resist": ("reset", "keep", "travel"), "resist_outer": ("keep",),
}  # fmt: skip


@dataclass(frozen=True)
class Case(AnyCase):
    """One training."""

    method: str  # a key of `TITLES`
    workers: int  # number of workers
    seed: int  # of weights, order, augmentation and partitions
    lr: float  # highest learning rate
    momentum: str = ""  # policy at a sync; empty where there is none
    images: bool = False  # the ViT; else the language model

    @property
    def syncs(self) -> bool:
        """Whether workers train alone and meet at syncs."""
        return self.method in POLICIES


def config_of(case: Case, options: Any) -> Config:
    """The package's settings for a method with syncs."""
    blocks: Any = BLOCKS if case.method in PARTITIONING else []
    outer: Any = "nesterov" if case.method in OUTER else "none"
    momentum: Any = case.momentum
    return Config(local_steps=options.local_steps, seed=case.seed, blocks=blocks, momentum=momentum, outer=outer)


def _methods(seed: int, lr: float, options: Any, *, images: bool) -> list[Case]:
    """All methods, the most workers first: an interrupted study has the most telling rows."""
    cases = [Case("single", 1, seed, lr, images=images)]
    for workers in sorted(options.workers, reverse=True):
        for method in TITLES:
            for momentum in POLICIES.get(method, ()):
                cases.append(Case(method, workers, seed, lr, momentum, images=images))
        cases.append(Case("ddp", workers, seed, lr, images=images))
    return cases


def language(options: Any) -> list[Case]:
    """All methods on the language model, equal samples."""
    return [case for seed in range(options.seeds) for case in _methods(seed, options.lr, options, images=False)]


def images(options: Any) -> list[Case]:
    """All methods on the ViT, equal samples."""
    return [
        case for seed in range(options.image_seeds) for case in _methods(seed, options.image_lr, options, images=True)
    ]


def rates(options: Any) -> list[Case]:
    """Learning rates of short trainings of the language model, judged on the hold-out."""
    most = max(options.workers)
    chosen = [
        Case("single", 1, RATES_SEED, 0.0),
        Case("local_sgd", most, RATES_SEED, 0.0, "keep"),
        Case("resist", most, RATES_SEED, 0.0, "keep"),
        Case("resist", most, RATES_SEED, 0.0, "reset"),
    ]
    return [replace(case, lr=lr) for lr in options.rates for case in chosen]


STUDIES: dict[str, Callable[[Any], list[Case]]] = {study.__name__: study for study in (language, images, rates)}

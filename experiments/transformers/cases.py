"""The cases of each study: a case is one training, and a study makes one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from experiments.harness.study import Case as AnyCase
from resist_lightning import Config

TITLES = {
    "single": "one process", "ddp": "DDP", "local_sgd": "local SGD", "diloco": "DiLoCo",
    "resist": "ResIST", "resist_outer": "ResIST, outer step", "resist_growth": "ResIST, outer step, growth",
}  # fmt: skip
PARTITIONING = ("resist", "resist_outer", "resist_growth")
OUTER = ("diloco", "resist_outer", "resist_growth")
GROWTH = (0.5, 1.0)  # shares of the blocks, each for half of the rounds
BLOCKS = "blocks.[!0]*"  # all but the first: the default of `resist`, except in very small networks
RATES_SEED = 1000  # no other study uses it
ALL_POLICIES = ("reset", "keep", "travel")
# Policies for Adam's state at a sync, by method; DiLoCo's paper keeps it.
POLICIES = {
    "local_sgd": ("reset", "keep"), "diloco": ("keep",), "resist": ALL_POLICIES, "resist_outer": ("keep",),
    "resist_growth": ("keep",),
}  # fmt: skip


@dataclass(frozen=True)
class Case(AnyCase):
    """A training of one of the two networks."""

    method: str  # a key of `TITLES`
    workers: int  # number of workers
    seed: int  # of weights, order, augmentation and partitions
    lr: float  # highest learning rate
    momentum: str = ""  # policy at a sync; empty where there is none
    images: bool = False  # the ViT; else the language model
    outer_momentum: float | None = None  # of the outer optimizer; None is the default

    @property
    @override
    def key(self) -> dict[str, Any]:
        """The key in the result file, without a default outer momentum: rows measured before it have none."""
        return {name: value for name, value in super().key.items() if name != "outer_momentum" or value is not None}

    @property
    def syncs(self) -> bool:
        """Whether workers train alone between syncs."""
        return self.method in POLICIES


def config_of(case: Case, options: Any) -> Config:
    """The package's config for a method with syncs."""
    blocks: Any = BLOCKS if case.method in PARTITIONING else []
    outer: Any = "nesterov" if case.method in OUTER else "none"
    momentum: Any = case.momentum
    growth = GROWTH if case.method == "resist_growth" else None
    settings = {"growth": growth, "momentum": momentum, "outer": outer, "outer_momentum": case.outer_momentum}
    return Config(local_steps=options.local_steps, seed=case.seed, blocks=blocks, **settings)


def outer_momentum_of(case: Mapping[str, Any]) -> float | None:
    """The outer momentum of a row's case; None where there is no outer step."""
    if case["method"] not in OUTER:
        return None
    default = Config(outer="nesterov").outer_momentum_of(case["workers"])
    return float(case.get("outer_momentum", default))


def _methods(seed: int, lr: float, options: Any, *, images: bool) -> list[Case]:
    """All methods, the most workers first: an interrupted study has the most telling rows."""
    cases = [Case("single", 1, seed, lr, images=images)]
    for workers in sorted(options.workers, reverse=True):
        for method in TITLES:
            policies = [policy for policy in POLICIES.get(method, ()) if policy in options.policies]
            cases += [Case(method, workers, seed, lr, policy, images=images) for policy in policies]
        cases.append(Case("ddp", workers, seed, lr, images=images))
    return cases


def language(options: Any) -> list[Case]:
    """All methods on the language model, equal samples; ResIST with other outer momenta than the default too."""
    cases: list[Case] = []
    for seed in range(options.seeds):
        for case in _methods(seed, options.lr, options, images=False):
            cases.append(case)
            if case.method == "resist_outer":
                default = outer_momentum_of(case.key)
                others = [momentum for momentum in options.outer_momenta if momentum != default]
                cases += [replace(case, outer_momentum=momentum) for momentum in others]
    return cases


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

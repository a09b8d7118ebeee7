"""The cases of each study: a case is one training, and a study makes one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from experiments.harness.study import Case as AnyCase
from experiments.networks import PAPER_BLOCKS, FastPreActResNet, OpenResNet
from experiments.trainers import steps_of
from resist_lightning import Config, PostLocal
from resist_lightning.models import PreActResNet

WIRES = ("fp32", "bf16", "int8", "int6", "int4", "int2")
SHORT_ROUND = 10  # local steps at S = 8 after tuning: the paper says fewer than 50 and gives no number
TITLES = {
    "single": "one process", "ddp": "DDP", "local_sgd": "local SGD", "post_local": "post-local SGD", "diloco": "DiLoCo",
    "resist": "ResIST", "resist_outer": "ResIST, outer step", "resist_growth": "ResIST, outer step, growth",
}  # fmt: skip
PARTITIONING = ("resist", "resist_outer", "resist_growth")
OUTER = ("diloco", "resist_outer", "resist_growth")
GROWTH = (0.25, 0.5, 1.0)  # shares of the blocks, each for a third of the rounds
MOMENTA = (0.5, 0.65, 0.825, 0.9)  # of the outer optimizer: the defaults of 2, 4 and 8 workers, and a smaller one
# `Config.blocks` by name.
PARTITIONED: dict[str, Any] = {
    "naive": "section[1-4].*", "strided_shared": "section[1-4].[!0]*", "paper": PAPER_BLOCKS, "none": [],
}  # fmt: skip


@dataclass(frozen=True)
class Case(AnyCase):
    """A training of the accuracy study."""

    method: str  # a key of `TITLES`
    workers: int  # number of workers
    seed: int  # of weights, order, augmentation and partitions
    lr: float  # highest learning rate
    local_steps: int = 0  # local steps per round; 0 where there are no rounds
    min_blocks: int = 0  # minimum number of blocks per worker
    momentum: str = "reset"  # policy at a sync
    wire: str = "fp32"  # format of the numbers on the wire
    network: str = "preact"  # preact, open_pre or open_post
    blocks: str = "paper"  # a key of `PARTITIONED`
    overlap: int = 0  # local steps beside which a sync runs
    fragments: int = 1  # of the network; one is synced after each round
    outer_momentum: float | None = None  # of the outer optimizer; None is the default
    optimizer: str = "sgd"  # of the local steps: sgd or muon

    @property
    @override
    def key(self) -> dict[str, Any]:
        """The key in the result file, without newer fields at their defaults: rows measured before these have none."""
        newer = {"overlap": 0, "fragments": 1, "outer_momentum": None, "optimizer": "sgd"}
        return {name: value for name, value in super().key.items() if name not in newer or value != newer[name]}


def config_of(case: Case, options: Any) -> Config:
    """The package's config for a method with rounds."""
    partitioning = case.method in PARTITIONING
    depth: dict[str, Any] = {"min_blocks": case.min_blocks} if partitioning else {}
    if case.method == "resist_growth":
        depth = {"growth": GROWTH}
    blocks = PARTITIONED[case.blocks if partitioning else "none"]
    outer = "nesterov" if case.method in OUTER else "none"
    policies: dict[str, Any] = {"momentum": case.momentum, "wire": case.wire, "outer": outer, "overlap": case.overlap}
    policies |= {"fragments": case.fragments, "outer_momentum": case.outer_momentum}
    local_steps: int | PostLocal = case.local_steps
    if case.method == "post_local":
        half = steps_of(options.samples, options.batch, case.workers) // 2
        local_steps = PostLocal(1, case.local_steps, half)
    return Config(local_steps=local_steps, seed=case.seed, blocks=blocks, **policies, **depth)


def make_network(case: Case, options: Any, channels: int) -> nn.Module:
    """The network of a case, with the same weights for all methods of one seed."""
    torch.manual_seed(case.seed)
    size: dict[str, Any] = {"width_multiplier": options.width, "in_channels": channels}
    sections = (1, 1, options.deep, 1)
    if case.network == "preact" and options.fast:
        return FastPreActResNet(sections, zero_branches=options.zero_branches, **size)
    if case.network == "preact":
        return PreActResNet(sections, 10, **size)
    return OpenResNet((2, 2, options.deep, 2), 10, pre_activation=case.network == "open_pre", **size)


def base(method: str, workers: int, seed: int, options: Any) -> Case:
    """The case of the main table."""
    if method in ("single", "ddp"):
        return Case(method, workers, seed, options.lr, blocks="none")
    if method not in PARTITIONING:
        # As in their papers; with rounds of one step, a reset would be SGD without momentum.
        momentum = "keep" if method in ("post_local", "diloco") else "reset"
        return Case(method, workers, seed, options.lr, options.local_steps, momentum=momentum, blocks="none")
    least = 0 if method == "resist_growth" else options.min_blocks
    return Case(method, workers, seed, options.lr, options.local_steps, least)


ORDER = ("resist", "resist_outer", "ddp", "resist_growth", "local_sgd", "diloco")
COUNTS = (8, 2, 4)  # workers


def main(options: Any) -> list[Case]:
    """All methods, equal samples."""
    # The extremes first, and the most expensive method last: an interrupted study has the most telling rows.
    trained = [
        ("single", 1),
        *((method, workers) for workers in options.counts for method in ORDER),
        *(("post_local", workers) for workers in options.counts),
    ]
    return [base(method, workers, seed, options) for seed in range(options.seeds) for method, workers in trained]


def design(options: Any) -> list[Case]:
    """The paper's design steps, in its order; scaling is another evaluation of the third."""
    cases: list[Case] = []
    for seed in range(options.ablation_seeds):
        two, eight = (base("resist", workers, seed, options) for workers in (2, 8))
        # The paper's first steps use networks with the activation after the sum.
        post = replace(two, network="open_post", min_blocks=0)
        cases += [replace(post, blocks="naive"), replace(post, blocks="strided_shared"), post]
        cases += [replace(post, network="open_pre")]
        cases += [replace(eight, min_blocks=least, network="open_pre") for least in _least_blocks(options)]
        cases += [replace(eight, local_steps=SHORT_ROUND, network="open_pre")]
    return cases


def _least_blocks(options: Any) -> list[int]:
    return sorted({0, options.min_blocks, min(5, options.deep - 1)})


def local_steps(options: Any) -> list[Case]:
    """Rounds of different length."""
    return [
        replace(base(method, 2, seed, options), local_steps=steps)
        for seed in range(options.ablation_seeds)
        for steps in options.lengths
        for method in ("resist", "local_sgd")
    ]


def _changed(options: Any, workers: int, key: str, values: Any) -> list[Case]:
    """ResIST with one setting changed."""
    seeds = range(options.ablation_seeds)
    return [replace(base("resist", workers, seed, options), **{key: value}) for seed in seeds for value in values]


def momentum(options: Any) -> list[Case]:
    """Policies for momentum at a sync."""
    return _changed(options, 2, "momentum", ("reset", "keep", "travel"))


def batch_norm(options: Any) -> list[Case]:
    """Batch-norm policies: evaluations of the main table's trainings."""
    return [
        base("resist", workers, seed, options) for seed in range(options.seeds) for workers in sorted(options.counts)
    ]


def scale(options: Any) -> list[Case]:
    """Test-time scales, which differ where workers share blocks."""
    return _changed(options, 8, "min_blocks", _least_blocks(options))


def wire(options: Any) -> list[Case]:
    """Fewer bits on the wire; the fewest also for methods that average everything."""
    averaged: list[Case] = []
    for seed in range(options.ablation_seeds):
        diloco = replace(base("diloco", 2, seed, options), outer_momentum=0.9)  # as in its paper
        for case in (base("local_sgd", 2, seed, options), diloco):
            averaged += [replace(case, wire=bits) for bits in (options.wires[0], options.wires[-1])]
    return [*_changed(options, 2, "wire", options.wires), *averaged]


def overlap(options: Any) -> list[Case]:
    """Syncs beside the training, over one and two fifths of a round; and of single fragments, in shorter rounds."""
    steps = [options.local_steps * fifths // 5 for fifths in (0, 1, 2)]
    short = max(options.local_steps // options.fragments, 2)
    cases: list[Case] = []
    for seed in range(options.seeds):
        whole = base("resist", 2, seed, options)
        cases += [replace(whole, overlap=beside) for beside in sorted(set(steps))]
        pieces = replace(whole, fragments=options.fragments, local_steps=short)
        cases += [replace(pieces, overlap=beside) for beside in range(min(short, 3))]
    return cases


def outer(options: Any) -> list[Case]:
    """Momenta of the outer optimizer by number of workers, in rounds of equally many samples."""
    cases: list[Case] = []
    for seed, workers in product(range(options.seeds), sorted(options.counts)):
        steps = max(1, 2 * options.local_steps // workers)
        default = Config(outer="nesterov").outer_momentum_of(workers)
        cases.append(replace(base("resist", workers, seed, options), local_steps=steps))
        for momentum in options.outer_momenta:
            stepping = replace(base("resist_outer", workers, seed, options), local_steps=steps)
            # As the default, so that it is the case of the main table where the round is as long.
            cases.append(stepping if momentum == default else replace(stepping, outer_momentum=momentum))
    return cases


def optimizer(options: Any) -> list[Case]:
    """SGD and Muon in the local steps."""
    cases: list[Case] = []
    for seed in range(options.seeds):
        for method, workers in (("single", 1), *product(("resist_outer", "resist", "ddp", "diloco"), options.counts)):
            usual = base(method, workers, seed, options)
            cases += [usual, replace(usual, optimizer="muon", lr=options.muon_lr)]
    return cases


def rates(options: Any) -> list[Case]:
    """Learning rates, judged on the hold-out; with a seed that no other study uses."""
    methods = [method for method in ORDER if method != "resist_growth"]
    trained = [*((method, options.counts[0]) for method in methods), ("single", 1)]
    return [replace(base(method, workers, 1000, options), lr=lr) for method, workers in trained for lr in options.rates]


def own_rate(options: Any) -> list[Case]:
    """The rate that all methods have, and a lower one for those whose hold-out is best at it in :func:`rates`."""
    cases: list[Case] = []
    for seed, method in product(range(options.seeds), ("resist", "resist_outer", "local_sgd", "diloco")):
        usual = base(method, max(options.counts), seed, options)
        cases += [usual, replace(usual, lr=options.low_lr)]
    return cases


STUDIES: dict[str, Callable[[Any], list[Case]]] = {
    study.__name__: study
    for study in (
        main, design, local_steps, momentum, batch_norm, scale, wire, overlap, outer, optimizer, own_rate, rates,
    )
}  # fmt: skip

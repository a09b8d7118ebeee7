"""What is trained: a case is one training, a study is a list of cases and makes one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.accuracy.networks import partitioned
from experiments.accuracy.settings import Settings
from resist_lightning import Config

WIRES = ("fp32", "bf16", "int8", "int6", "int4")
SHORT_ROUND = 10
"""Local steps at S = 8 after tuning: the paper says fewer than 50 and gives no number."""


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        method: single, ddp, local_sgd or resist.
        workers: number of workers.
        seed: of weights, order, augmentation and partitions.
        lr: initial learning rate.
        local_steps: local steps per round; 0 where there are no rounds.
        min_blocks: least blocks per worker.
        momentum: policy at a sync.
        wire: what a number is on the wire.
        network: one of `networks.NETWORKS`.
        blocks: naive, strided_shared, paper or none.
    """

    method: str
    workers: int
    seed: int
    lr: float
    local_steps: int = 0
    min_blocks: int = 0
    momentum: str = "reset"
    wire: str = "fp32"
    network: str = "preact"
    blocks: str = "paper"

    @property
    def key(self) -> dict[str, Any]:
        """All settings of the case, as they stand in a record."""
        return asdict(self)

    @property
    def name(self) -> str:
        """For progress lines."""
        return f"{self.method} S={self.workers} seed {self.seed} {self.network} l={self.local_steps} {self.wire}"


def config_of(case: Case) -> Config:
    """The package's settings for local SGD or ResIST."""
    options: dict[str, Any] = {"wire": case.wire}
    if case.method == "local_sgd":
        options["blocks"] = partitioned("none")
    else:
        options |= {"blocks": partitioned(case.blocks), "min_blocks": case.min_blocks}
    return Config(local_steps=case.local_steps, seed=case.seed, momentum=case.momentum, **options)  # type: ignore[arg-type]


def base(method: str, workers: int, seed: int, settings: Settings) -> Case:
    """The case of the main table."""
    if method in ("single", "ddp"):
        return Case(method, workers, seed, settings.lr, blocks="none")
    if method == "local_sgd":
        return Case(method, workers, seed, settings.lr, settings.local_steps, blocks="none")
    return Case(method, workers, seed, settings.lr, settings.local_steps, settings.min_blocks)


MAIN = (
    ("single", 1), ("ddp", 2), ("local_sgd", 2), ("local_sgd", 4), ("local_sgd", 8),
    ("resist", 2), ("resist", 4), ("resist", 8),
)  # fmt: skip


def main(settings: Settings) -> list[Case]:
    """All methods, equal samples."""
    return [base(method, workers, seed, settings) for seed in range(settings.seeds) for method, workers in MAIN]


def design(settings: Settings) -> list[Case]:
    """The paper's design steps, in its order; scaling is another evaluation of the third."""
    cases: list[Case] = []
    for seed in range(settings.ablation_seeds):
        two, eight = (base("resist", workers, seed, settings) for workers in (2, 8))
        post = replace(two, network="open_post", min_blocks=0)
        cases += [replace(post, blocks="naive"), replace(post, blocks="strided_shared"), post]
        cases += [replace(post, network="open_pre")]
        cases += [replace(eight, min_blocks=least, network="open_pre") for least in _least_blocks(settings)]
        cases += [replace(eight, local_steps=SHORT_ROUND, network="open_pre")]
    return cases


def _least_blocks(settings: Settings) -> list[int]:
    return sorted({0, settings.min_blocks, min(5, settings.deep - 1)})


def local_steps(settings: Settings) -> list[Case]:
    """Rounds of different length."""
    return [
        replace(base(method, 2, seed, settings), local_steps=steps)
        for seed in range(settings.ablation_seeds)
        for steps in settings.lengths
        for method in ("resist", "local_sgd")
    ]


def momentum(settings: Settings) -> list[Case]:
    """What happens to momentum at a sync."""
    return [
        replace(base("resist", 2, seed, settings), momentum=policy)
        for seed in range(settings.ablation_seeds)
        for policy in ("reset", "keep", "travel")
    ]


def batch_norm(settings: Settings) -> list[Case]:
    """Batch-norm policies: evaluations of the main table's trainings."""
    return [base("resist", workers, seed, settings) for seed in range(settings.seeds) for workers in (2, 4, 8)]


def scale(settings: Settings) -> list[Case]:
    """Test-time scales, which differ where workers share blocks."""
    return [
        replace(base("resist", 8, seed, settings), min_blocks=least)
        for seed in range(settings.ablation_seeds)
        for least in _least_blocks(settings)
    ]


def wire(settings: Settings) -> list[Case]:
    """Numbers of fewer bits on the wire."""
    return [
        replace(base("resist", 2, seed, settings), wire=bits)
        for seed in range(settings.ablation_seeds)
        for bits in WIRES
    ]


def rates(settings: Settings) -> list[Case]:
    """Learning rates, judged on the hold-out; a seed that no other study uses."""
    return [
        replace(base(method, workers, 1000, settings), lr=lr)
        for method, workers in (("single", 1), ("ddp", 2), ("local_sgd", 8), ("resist", 2), ("resist", 8))
        for lr in settings.rates
    ]


STUDIES: dict[str, Callable[[Settings], list[Case]]] = {
    study.__name__: study for study in (main, design, local_steps, momentum, batch_norm, scale, wire, rates)
}

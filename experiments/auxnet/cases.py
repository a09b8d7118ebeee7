"""What is trained: a case is one training; the tables choose among all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig

from experiments.auxnet.tasks import ALL
from experiments.links.options import gbit_of
from resist_lightning.methods.auxnet.config import StageConfig

AUXNET = ("penalty", "al-net", "penalty-store", "al-store")
SERIAL_STAGES = "serial-stages"
"""The penalty method in a warm-up that does not end: stages on workers that wait for each other, as back-propagation
must."""
HYBRID = "hybrid"
"""The penalty method with a step of back-propagation now and then."""
HYBRID_EVERY = 4
WITH_THREE = ("penalty", "al-net", HYBRID)
"""Methods that are trained on three workers too."""
SWEEP_SEED = 1000
"""Settings are judged on the hold-out, with a seed that no other table uses."""
SWEEP_WORKERS = 2
STEP_WORKERS = 3
"""Of the step of the guesses, which from three stages on is a question."""


@dataclass(frozen=True)
class Case:
    """One training. What a method does not have is None.

    Args:
        task: one of `tasks.ALL`.
        method: serial, pipeline, `SERIAL_STAGES`, `HYBRID`, or one of `AUXNET`.
        workers: number of processes, of one thread each.
        seed: of weights, order and augmentation.
        lr: learning rate at the start.
        augment: whether images are cropped and mirrored at random; off where guesses are stored.
        beta: weight of the penalty.
        aux_width: channels of the auxiliary networks.
        aux_learning_rate: of the auxiliary networks, at the start.
        warmup_steps: first steps, of plain back-propagation through the workers.
        serial_every: after them, steps from one of back-propagation to the next.
        lambda_step: step of the guess; None takes the default for the number of workers.
        multiplier_every: steps between two updates of the multipliers.
        schedule: of the pipeline.
        micro_batches: of the pipeline, in a step.
    """

    task: str
    method: str
    workers: int
    seed: int
    lr: float
    augment: bool = True
    beta: float | None = None
    aux_width: int | None = None
    aux_learning_rate: float | None = None
    warmup_steps: int | None = None
    serial_every: int | None = None
    lambda_step: float | None = None
    multiplier_every: int | None = None
    schedule: str | None = None
    micro_batches: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """All settings of the case, as they stand in a record."""
        return asdict(self)

    @property
    def name(self) -> str:
        """For progress lines."""
        hidden = ("task", "method", "workers", "seed", "lr")
        other = [f"{key}={value}" for key, value in self.key.items() if key not in hidden and value is not None]
        return " ".join([self.task, self.method, f"K={self.workers}", f"seed {self.seed}", *other])


@dataclass(frozen=True)
class LinkCase(Case):
    """A training whose workers are joined by links.

    Args:
        bandwidth_gbit: of the links; None for unshaped ones, and where there is one worker.
    """

    bandwidth_gbit: float | None = None


SETTINGS = (
    "beta", "aux_width", "aux_learning_rate", "warmup_steps", "serial_every", "lambda_step", "multiplier_every",
)  # fmt: skip


def settings_of(case: Case) -> dict[str, Any]:
    """What a `StageConfig` is given: the method, and settings that the case has."""
    return {"method": "penalty" if case.method in (SERIAL_STAGES, HYBRID) else case.method} | {
        key: value for key, value in case.key.items() if key in SETTINGS and value is not None
    }


def stored(method: str) -> bool:
    """Whether the method keeps guesses by sample, so that samples must not change."""
    return method.endswith("-store")


def base(task: str, method: str, workers: int, seed: int) -> Case:
    """The case of the main table, with the package's defaults; of a pipeline without its schedule."""
    case = Case(task, method, workers, seed, ALL[task].lr, augment=not stored(method))
    if method == HYBRID:
        return replace(base(task, "penalty", workers, seed), method=HYBRID, serial_every=HYBRID_EVERY)
    if method not in AUXNET:
        return case
    usual = StageConfig()
    case = replace(case, beta=usual.beta, warmup_steps=usual.warmup_steps)
    if not stored(method):
        case = replace(case, aux_width=usual.aux_width, aux_learning_rate=usual.aux_learning_rate)
    return replace(case, multiplier_every=usual.multiplier_every) if method.startswith("al-") else case


def accuracy_cases(cfg: DictConfig) -> list[Case]:
    """Every training of the accuracy study, once: seeds outermost, so that an interrupted study has whole seeds."""
    return [
        case for seed in range(cfg.seeds) for task in cfg.tasks for case in _methods(cfg, task, seed)
    ]  # fmt: skip


def _methods(cfg: DictConfig, task: str, seed: int) -> Iterator[Case]:
    smallest = cfg.size == "smoke"
    for method in cfg.methods:
        if method == "serial":
            yield base(task, method, 1, seed)
            yield replace(base(task, method, 1, seed), augment=False)
            continue
        for workers in cfg.workers:
            case = base(task, method, workers, seed)
            if method == "pipeline":
                case = replace(case, schedule=cfg.schedule, micro_batches=cfg.micro_batches)
            if case.warmup_steps is not None and smallest:
                case = replace(case, warmup_steps=2)
            if workers > 2 and method not in WITH_THREE:
                continue
            if workers > 1 or (method == "penalty" and seed == 0):  # alone, every method is plain training
                yield case


def sweep_cases(cfg: DictConfig) -> list[Case]:
    """One thing changed at a time; of the penalty method beta and the size of the auxiliary networks together."""
    found: list[Case] = []
    for task in cfg.sweep_tasks:
        usual, al, kept = (
            base(task, name, SWEEP_WORKERS, SWEEP_SEED) for name in ("penalty", "al-net", "penalty-store")
        )
        if cfg.size == "smoke":
            usual, al, kept = (replace(case, warmup_steps=2) for case in (usual, al, kept))
        found += [replace(usual, beta=beta, aux_width=width) for beta in cfg.betas for width in cfg.aux_widths]
        found += [
            replace(case, beta=beta) for case in (al, kept, replace(kept, method="al-store")) for beta in cfg.betas
        ]
        found += [replace(usual, aux_learning_rate=rate) for rate in cfg.aux_rates]
        found += [replace(usual, warmup_steps=steps) for steps in cfg.warmups]
        found += [replace(usual, method=HYBRID, serial_every=every) for every in cfg.serial_every]
        found += [replace(usual, workers=STEP_WORKERS, lambda_step=step) for step in cfg.lambda_steps]
    return [
        replace(case, multiplier_every=base(case.task, "al-store", 1, 0).multiplier_every)
        if case.method == "al-store"
        else case
        for case in dict.fromkeys(found)
    ]


def timing_cases(cfg: DictConfig) -> list[Case]:
    """The same networks by every method, turn and turn about; the seed is the number of the turn."""
    found = []
    for turn in range(cfg.repeats):
        for network in cfg.networks:
            found.append(base(network, "serial", 1, turn))
            for method in (name for name in cfg.methods if name not in ("serial", "pipeline")):
                case = replace(base(network, method, 2, turn), warmup_steps=2)
                found.append(case)
            found += _pipelines(cfg, network, turn)
    return found


def link_cases(cfg: DictConfig) -> list[LinkCase]:
    """One process, and two workers over every link, turn and turn about; the seed is the number of the turn."""
    found = []
    for turn in range(cfg.repeats):
        for network in cfg.link_networks:
            if "serial" in cfg.methods:
                found.append(LinkCase(**base(network, "serial", 1, turn).key))
            cases = _pipelines(cfg, network, turn)
            if "penalty" in cfg.methods:
                usual = base(network, "penalty", 2, turn)
                cases.append(replace(usual, method=SERIAL_STAGES, warmup_steps=cfg.link_steps))
                cases.append(replace(usual, warmup_steps=2))
            found += [
                LinkCase(**case.key, bandwidth_gbit=gbit_of(entry)) for entry in cfg.bandwidths_gbit for case in cases
            ]
    return found


def _pipelines(cfg: DictConfig, network: str, turn: int) -> list[Case]:
    if "pipeline" not in cfg.methods:
        return []
    pipe = base(network, "pipeline", 2, turn)
    return [replace(pipe, schedule=name, micro_batches=cfg.micro_batches) for name in ("gpipe", "1f1b")]

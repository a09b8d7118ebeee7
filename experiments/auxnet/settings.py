"""What a command line of `run.py` may say, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from experiments.auxnet.tasks import ALL, TASKS, TIMED
from experiments.harness.cli import check_list, check_out, read_studies
from experiments.harness.settings import ConfigError, limited
from experiments.links.options import UNSHAPED, check_bandwidths

RESULTS = Path(__file__).parent / "results"
STUDIES = ("accuracy", "sweep", "timing", "links")
METHODS = ("serial", "penalty", "al-net", "hybrid", "penalty-store", "al-store", "pipeline")
SCHEDULES = ("gpipe", "1f1b")
KNOWN: Mapping[str, Iterable[str]] = {
    "tasks": TASKS, "sweep_tasks": TASKS, "networks": TIMED, "link_networks": TIMED, "methods": METHODS,
}  # fmt: skip
"""What lists of names choose from."""
LISTS = (
    *KNOWN, "workers", "betas", "aux_widths", "aux_rates", "warmups", "serial_every", "lambda_steps", "bandwidths_gbit",
)  # fmt: skip
RECORDED = {
    "accuracy": ("epochs", "evaluations"), "sweep": ("epochs", "evaluations"), "timing": ("steps",),
    "links": ("link_steps",),
}  # fmt: skip
"""What the results of a study depend on, besides their cases."""
MOST_WORKERS = 3
"""As many as tasks have cuts for."""


@dataclass
class Settings:
    """The command line; ``size`` changes several at once."""

    size: str = limited(choices=("full", "smoke"), hint="smoke runs in seconds")
    out: str = limited(hint="folder of the result files")
    fresh: bool = limited(hint="true measures again what is there")
    folder: str | None = limited(hint="folder=PATH with train/<class>/* and test/<class>/*, for the tasks cifar_*")
    cache_dir: str = limited(hint="where decoded images are kept")
    tasks: list[str] = MISSING
    methods: list[str] = MISSING
    workers: list[int] = MISSING
    seeds: int = limited(least=1, most=100, hint="3 for a spread")
    epochs: int | None = limited(least=1, hint="passes over the training images; null: the task's")
    evaluations: int = limited(least=1, hint="evaluations per training, at equal distances")
    micro_batches: int = limited(least=2, hint="of the pipeline, per step; the batch must be a multiple")
    schedule: str = limited(choices=SCHEDULES, hint="of the pipeline")
    sweep_tasks: list[str] = MISSING
    betas: list[float] = MISSING
    aux_widths: list[int] = MISSING
    aux_rates: list[float] = MISSING
    warmups: list[int] = MISSING
    serial_every: list[int] = MISSING
    lambda_steps: list[float] = MISSING
    networks: list[str] = MISSING
    steps: int = limited(least=4, hint="steps of a training that is only timed; the first third is not counted")
    repeats: int = limited(least=1, hint="trainings of each kind that are timed, turn and turn about")
    link_networks: list[str] = MISSING
    link_steps: int = limited(least=4, hint="steps of a training over a link; the first third is not counted")
    bandwidths_gbit: list[Any] = MISSING


SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "size": "full", "out": str(RESULTS), "fresh": False, "folder": None, "cache_dir": "runs/cache",
        "tasks": list(TASKS), "methods": list(METHODS), "workers": [1, 2, 3], "seeds": 3, "epochs": None,
        "evaluations": 4, "micro_batches": 4, "schedule": "gpipe", "sweep_tasks": ["digits", "cifar_deep"],
        "betas": [0.1, 1.0, 10.0, 100.0], "aux_widths": [16, 32, 64], "aux_rates": [0.03, 0.1, 0.3],
        "warmups": [0, 50, 200], "serial_every": [2, 4, 8], "lambda_steps": [0.1, 0.3, 1.0],
        "networks": list(TIMED), "steps": 30, "repeats": 3,
        "link_networks": ["resnet_38", "wrn_16_4"], "link_steps": 12, "bandwidths_gbit": [0.1, 1, UNSHAPED],
    },
    "smoke": {
        "size": "smoke", "out": "runs/auxnet", "fresh": False, "folder": None, "cache_dir": "runs/cache",
        "tasks": ["digits"], "methods": list(METHODS), "workers": [1, 2], "seeds": 1, "epochs": None,
        "evaluations": 2, "micro_batches": 2, "schedule": "gpipe", "sweep_tasks": ["digits"],
        "betas": [0.1, 1.0], "aux_widths": [4], "aux_rates": [0.1], "warmups": [2], "serial_every": [2],
        "lambda_steps": [0.5],
        "networks": ["resnet_38"], "steps": 6, "repeats": 1,
        "link_networks": ["resnet_38"], "link_steps": 9, "bandwidths_gbit": [0.001, UNSHAPED],
    },
}  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[list[str], DictConfig]:
    """Names of studies (all of them if none is given), and the settings.

    Raises:
        ConfigError: an unknown study or key, or a value that is impossible.
    """
    names, cfg = read_studies(arguments, STUDIES, SIZES, Settings)
    _check_lists(cfg)
    _check_batches(cfg)
    _check_folders(cfg, names)
    return names, cfg


def _check_lists(cfg: DictConfig) -> None:
    for key in LISTS:
        check_list(cfg, key, SIZES["full"][key])
    _check_names(cfg)
    _check_numbers(cfg)
    check_bandwidths(cfg.bandwidths_gbit)


def _check_names(cfg: DictConfig) -> None:
    for key, known in KNOWN.items():
        for name in cfg[key]:
            if name not in known:
                raise ConfigError(f"{key}={list(cfg[key])}: {name!r} is not known; choose from {', '.join(known)}")


def _check_numbers(cfg: DictConfig) -> None:
    if not all(1 <= workers <= MOST_WORKERS for workers in cfg.workers):
        raise ConfigError(
            f"workers={list(cfg.workers)}: must be numbers from 1 to {MOST_WORKERS}; tasks.py has the cuts"
        )
    for key, least in (("aux_widths", 1), ("warmups", 0), ("serial_every", 1)):
        if min(cfg[key]) < least:
            raise ConfigError(f"{key}={list(cfg[key])}: must be whole numbers of at least {least}")
    for key in ("betas", "aux_rates", "lambda_steps"):
        if min(cfg[key]) <= 0:
            raise ConfigError(f"{key}={list(cfg[key])}: must be numbers above 0")
    if max(cfg.lambda_steps) > 1:
        raise ConfigError(f"lambda_steps={list(cfg.lambda_steps)}: must be numbers of at most 1")


def _check_batches(cfg: DictConfig) -> None:
    if cfg.schedule == "1f1b" and "pipeline" in cfg.methods and max(cfg.workers) > cfg.micro_batches:
        raise ConfigError(
            f"micro_batches={cfg.micro_batches}: schedule=1f1b needs as many micro-batches as workers, {max(cfg.workers)}; "
            "raise it, or take schedule=gpipe"
        )
    for name in dict.fromkeys([*cfg.tasks, *cfg.networks, *cfg.link_networks]):
        batch = ALL[name].scales[cfg.size].batch
        if "pipeline" in cfg.methods and batch % cfg.micro_batches:
            raise ConfigError(
                f"micro_batches={cfg.micro_batches}: {name} has batches of {batch}, which must be a multiple, so that the "
                "mean over micro-batches is that over the batch"
            )


def _check_folders(cfg: DictConfig, names: Sequence[str]) -> None:
    used = [*(cfg.tasks if "accuracy" in names else []), *(cfg.sweep_tasks if "sweep" in names else [])]
    wanting = [name for name in used if TASKS[name].images == "folder"]
    if wanting and (cfg.folder is None or not Path(cfg.folder).is_dir()):
        raise ConfigError(
            f"folder={cfg.folder}: {wanting[0]} needs a folder with train/<class>/* and test/<class>/*; give "
            "folder=PATH, or take tasks=[digits] sweep_tasks=[digits]"
        )
    check_out(cfg, RESULTS, small="smoke", called="a smoke run")


def recorded(cfg: DictConfig, study: str) -> Mapping[str, Any]:
    """What a result depends on, besides its case."""
    return {key: cfg[key] for key in ("size", *RECORDED[study])}

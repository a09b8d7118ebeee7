"""What a command line of `run.py` may say, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from experiments.accuracy.settings import LARGEST_WORKERS
from experiments.harness.cli import check_list, check_out, read_studies
from experiments.harness.settings import ConfigError, limited
from experiments.ist.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
STUDIES = ("accuracy", "memory", "shapes")


@dataclass
class Settings:
    """The command line; ``size`` changes several at once."""

    size: str = limited(choices=("full", "sample"), hint="sample runs in seconds")
    out: str = limited(hint="folder of the result files")
    jobs: int = limited(least=1, most=64, hint="trainings of the accuracy study at a time, one core each")
    fresh: bool = limited(hint="true measures again what is there")
    tasks: list[str] = MISSING
    seeds: int = limited(least=1, most=100, hint="3 for a spread")
    ablation_seeds: int = limited(least=1, most=100, hint="seeds of the trainings that only ablations have")
    workers: list[int] = MISSING
    passes: int | None = limited(least=1, hint="passes over the training examples, of all workers; null: the task's")
    widths: list[int] = MISSING
    memory_workers: list[int] = MISSING
    inputs: int = limited(least=1, hint="of the networks whose memory and speed are measured; 4096 in the paper")
    rounds: int = limited(least=1, hint="rounds in a mean of bytes")
    steps: int = limited(least=1, hint="local steps that are timed")


SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "size": "full", "out": str(RESULTS), "jobs": 2, "fresh": False, "tasks": list(TASKS), "seeds": 3,
        "ablation_seeds": 3, "workers": [2, 4, 8], "passes": None, "widths": [4096, 8192], "memory_workers": [1, 2, 4, 8],
        "inputs": 4096, "rounds": 20, "steps": 9,
    },
    "sample": {
        "size": "sample", "out": "runs/ist", "jobs": 1, "fresh": False, "tasks": list(TASKS), "seeds": 1,
        "ablation_seeds": 1, "workers": [2, 4], "passes": None, "widths": [64], "memory_workers": [1, 2, 4],
        "inputs": 32, "rounds": 2, "steps": 2,
    },
}  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[list[str], DictConfig]:
    """Names of studies (all of them if none is given), and the settings.

    Raises:
        ConfigError: an unknown study or key, or a value that is impossible.
    """
    names, cfg = read_studies(arguments, STUDIES, SIZES, Settings)
    _check_lists(cfg)
    check_out(cfg, RESULTS, small="sample", called="a sample")
    return names, cfg


def _check_lists(cfg: DictConfig) -> None:
    for key in ("tasks", "workers", "widths", "memory_workers"):
        check_list(cfg, key, SIZES["full"][key])
    for task in cfg.tasks:
        if task not in TASKS:
            raise ConfigError(f"tasks={list(cfg.tasks)}: {task!r} is not known; choose from {', '.join(TASKS)}")
    for workers in cfg.workers:
        if not 2 <= workers <= LARGEST_WORKERS or LARGEST_WORKERS % workers:
            raise ConfigError(f"workers={list(cfg.workers)}: {workers} must be 2, 4 or 8, so that samples are equal")
    for key, least in (("memory_workers", 1), ("widths", max(cfg.memory_workers))):
        if min(cfg[key]) < least:
            raise ConfigError(f"{key}={list(cfg[key])}: must be whole numbers of at least {least}")


def recorded(cfg: DictConfig) -> Mapping[str, Any]:
    """What a training's result depends on, besides its case; `tasks` says the rest."""
    return {"size": cfg.size, "passes": cfg.passes}

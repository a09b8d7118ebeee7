"""What a command line of `run.py` may say, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.accuracy.settings import LARGEST_WORKERS
from experiments.checks import ConfigError, check_keys
from experiments.ist.tasks import TASKS
from experiments.limits import limited

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
    words = [argument for argument in arguments if "=" not in argument]
    for word in words:
        if word not in STUDIES:
            raise ConfigError(f"{word}: there is no such study; choose from {', '.join(STUDIES)}")
    try:
        given = OmegaConf.from_dotlist([argument for argument in arguments if "=" in argument])
        cfg = OmegaConf.merge(SIZES.get(str(given.get("size", "full")), SIZES["full"]), given)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ConfigError(f"{' '.join(arguments)}: cannot be read ({error}); write key=value") from error
    assert isinstance(cfg, DictConfig)
    check_keys(cfg, Settings, "")
    _check_lists(cfg)
    out = Path(cfg.out)
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"out={cfg.out}: {existing} is a file, and a folder is needed; choose another, out=FOLDER")
    if cfg.size == "sample" and out.resolve() == RESULTS:
        raise ConfigError(f"out={cfg.out}: a sample must not stand among the results; give out=FOLDER")
    return [name for name in STUDIES if name in words or not words], cfg


def _check_lists(cfg: DictConfig) -> None:
    for key in ("tasks", "workers", "widths", "memory_workers"):
        if not isinstance(cfg[key], ListConfig) or not cfg[key]:
            raise ConfigError(f"{key}={cfg[key]}: must be a list of one or more, e.g. {key}={SIZES['full'][key]}")
        if len(set(cfg[key])) < len(cfg[key]):
            raise ConfigError(f"{key}={list(cfg[key])}: an entry stands there twice; name each once")
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

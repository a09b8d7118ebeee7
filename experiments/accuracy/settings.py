"""Options of the command line, their sizes and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.harness.settings import ConfigError, check_keys, limited

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LARGEST_WORKERS = 8
"""Samples are counted in steps of this many workers, so that all methods see exactly the same number."""


@dataclass
class Settings:
    """The command line; ``size`` changes several at once. What is named in `NOT_RECORDED` does not change a result."""

    size: str = limited(choices=("full", "smoke"), hint="smoke runs in seconds")
    data: str = limited(choices=("folder", "cifar10", "digits"), hint="cifar10 is torchvision's download")
    folder: str | None = limited(hint="folder=PATH with train/<class>/* and test/<class>/*")
    cache_dir: str = limited(hint="where decoded images are kept")
    out: str = limited(hint="folder of the result files")
    jobs: int = limited(least=1, most=64, hint="cases at a time, one core each")
    fresh: bool = limited(hint="true measures again what is there")
    seeds: int = limited(least=1, most=100, hint="3 as in the paper")
    ablation_seeds: int = limited(least=1, most=100, hint="seeds of the cases that only ablations have")
    samples: int = limited(least=1, hint="training images that all workers of a case see together")
    batch: int = limited(least=1, hint="images per local step of one worker")
    eval_batch: int = limited(least=1, hint="images per evaluation step; matters to batch_norm=batch")
    evaluations: int = limited(least=1, hint="evaluations per training, at equal distances")
    limit: int | None = limited(least=1, hint="training images per class, null for all")
    limit_test: int | None = limited(least=1, hint="test images per class, null for all")
    holdout: float = limited(above=0, below=1, hint="share of the training images")
    shrink: int = limited(least=1, most=4, hint="2 averages squares of 2 x 2 pixels")
    width: float = limited(above=0, hint="1.0 is the paper's width")
    deep: int = limited(least=3, most=64, hint="blocks in section 3; all but the first are partitioned")
    lr: float = limited(above=0, hint="initial learning rate")
    local_steps: int = limited(least=1, hint="local steps per round")
    min_blocks: int = limited(least=0, hint="least blocks per worker")
    check_samples: int = limited(least=1, hint="training images in the check against real processes")
    lengths: list[int] = MISSING
    rates: list[float] = MISSING


FULL: dict[str, Any] = {
    "size": "full",
    "data": "folder",
    "folder": None,
    "cache_dir": "runs/cache",
    "out": str(RESULTS),
    "jobs": 2,
    "fresh": False,
    "seeds": 3,
    "ablation_seeds": 2,
    "samples": 61_440,
    "batch": 32,
    "eval_batch": 250,
    "evaluations": 8,
    "limit": None,
    "limit_test": 500,
    "holdout": 0.04,
    "shrink": 2,
    "width": 0.125,
    "deep": 9,
    "lr": 0.03,
    "local_steps": 25,
    "min_blocks": 2,
    "lengths": [10, 25, 50, 100, 250, 500],
    "rates": [0.01, 0.03, 0.1],
    "check_samples": 12_800,
}
SMOKE: dict[str, Any] = {
    "size": "smoke",
    "data": "digits",
    "jobs": 1,
    "seeds": 1,
    "ablation_seeds": 1,
    "samples": 192,
    "batch": 8,
    "evaluations": 2,
    "limit": 20,
    "limit_test": 5,
    "holdout": 0.1,
    "shrink": 1,
    "width": 0.0625,
    "deep": 4,
    "local_steps": 2,
    "lengths": [2, 10],
    "rates": [0.1],
    "check_samples": 256,
}
NOT_RECORDED = {"size", "folder", "cache_dir", "out", "jobs", "fresh", "seeds", "ablation_seeds", "lengths", "rates"}


def read_command_line(arguments: Sequence[str], studies: Sequence[str]) -> tuple[list[str], Settings]:
    """Names of studies (all of them if none is given) and the settings.

    Raises:
        ConfigError: an unknown study or key, or a value that is impossible.
    """
    words = [word for word in arguments if "=" not in word]
    for word in words:
        if word not in studies:
            raise ConfigError(f"{word}: there is no such study; choose from {', '.join(studies)}")
    try:
        given = OmegaConf.from_dotlist([word for word in arguments if "=" in word])
        size = given.get("size", "full")
        cfg = OmegaConf.merge(OmegaConf.create({**FULL, **(SMOKE if size == "smoke" else {})}), given)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    check_keys(cfg, Settings, "")
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    settings = Settings(**{item.name: plain[item.name] for item in fields(Settings)})
    _check_together(settings)
    return [name for name in studies if name in words or not words], settings


def _check_together(settings: Settings) -> None:
    if settings.data != "digits" and settings.folder is None:
        raise ConfigError(
            f"folder is missing: data={settings.data} needs folder=PATH (folder: train/<class>/* and test/<class>/*; "
            "cifar10: where torchvision's files are or shall be), or take data=digits"
        )
    if settings.data == "folder" and not Path(str(settings.folder)).is_dir():
        raise ConfigError(
            f"folder={settings.folder}: is not a folder; give one with train/<class>/* and test/<class>/*"
        )
    if settings.min_blocks > settings.deep - 1:
        raise ConfigError(
            f"min_blocks={settings.min_blocks}: deep={settings.deep} has {settings.deep - 1} blocks to partition; "
            f"set min_blocks={settings.deep - 1} or less"
        )
    for key in ("lengths", "rates"):
        value = getattr(settings, key)
        if not value or min(value) <= 0:
            raise ConfigError(
                f"{key}={value}: must be a list of one or more numbers above 0, e.g. {key}={FULL[key][:2]}"
            )
    step = settings.batch * LARGEST_WORKERS
    for key in ("samples", "check_samples"):
        value = getattr(settings, key)
        if value < step:
            raise ConfigError(f"{key}={value}: must be at least batch x {LARGEST_WORKERS} = {step}; raise it")


def recorded(settings: Settings) -> Mapping[str, Any]:
    """What a result depends on, besides the case."""
    return {key: value for key, value in asdict(settings).items() if key not in NOT_RECORDED}

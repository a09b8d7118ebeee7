"""What a command line of `run.py` may say, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.harness.settings import ConfigError, Limit, check_keys, limited

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
MOST_WORKERS = 8
PROCESSES = Limit(hint="of whole numbers, for example processes=[2,4]")

SIZES: dict[str, dict[str, Any]] = {
    "full": {"out": str(RESULTS), "rounds": 200, "processes": [2, 4, 8]},
    "smoke": {"out": str(ROOT / "outputs" / "paper_tables_smoke"), "rounds": 10, "processes": [2, 4]},
}


@dataclass
class Settings:
    size: str = limited(choices=tuple(SIZES), hint="smoke takes seconds, with a narrow network in the processes")
    out: str = limited(hint="a folder, which is made; out=FOLDER")
    rounds: int = limited(least=1, hint="200 is the default; 10 are enough for a look")
    processes: list[int] = field(default=MISSING, metadata={"limit": PROCESSES})


def parse(arguments: Sequence[str]) -> DictConfig:
    """The settings of a command line ``key=value ...``.

    Raises:
        ConfigError: an unknown key, a value outside its limits, or a folder that cannot be written.
    """
    malformed = [argument for argument in arguments if "=" not in argument]
    if malformed:
        raise ConfigError(f"{malformed[0]}: cannot be read as an option; write key=value, for example size=smoke")
    try:
        return _checked(OmegaConf.from_dotlist(list(arguments)))
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ConfigError(f"{' '.join(arguments)}: cannot be read ({error}); write key=value") from error


def _checked(given: DictConfig) -> DictConfig:
    size = given.get("size", "full")
    cfg = OmegaConf.merge({"size": size, **SIZES.get(str(size), SIZES["full"])}, given)
    assert isinstance(cfg, DictConfig)
    check_keys(cfg, Settings, "")
    cfg.out = str(cfg.out)
    _check_processes(cfg)
    _check_out(cfg)
    return cfg


def _check_processes(cfg: DictConfig) -> None:
    for workers in cfg.processes:
        if isinstance(workers, bool) or not 2 <= workers <= MOST_WORKERS:
            raise ConfigError(
                f"processes={list(cfg.processes)}: {workers} worker(s) cannot be measured; numbers from 2 to "
                f"{MOST_WORKERS}, for example processes=[2,4], or processes=[] to measure none"
            )


def _check_out(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"out={cfg.out}: {existing} is a file, and a folder is needed; choose another, out=FOLDER")
    if cfg.size == "smoke" and out.resolve() == RESULTS:
        raise ConfigError(f"out={cfg.out}: is for the full size, whose tables README.md shows; choose another folder")

"""Turns a command line into a checked configuration; a mistake is one line, and nothing has started yet."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from experiments.app.build import CONF
from experiments.harness.cli import readable_errors
from experiments.harness.settings import ConfigError

LAUNCHERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


def start_time(pattern: str) -> str:
    """The time for the name of a run's folder: with microseconds for ``-%f``, as runs may start within one second.

    Without them where torchrun, SLURM or the like has started the processes of one run, which share a folder.
    """
    several = any(launcher.detect() for launcher in LAUNCHERS)
    return datetime.now().strftime(pattern.replace("-%f", "") if several else pattern)


OmegaConf.register_new_resolver("start_time", start_time, use_cache=True, replace=True)


class Check(Protocol):
    """Raises ConfigError if a composed configuration cannot run."""

    def __call__(self, cfg: DictConfig, *, sweep: bool = False) -> None: ...


def check_command_line(config_name: str, check: Check, arguments: Sequence[str] | None = None) -> None:
    """Compose and check every job that the command line asks for, before Hydra starts the first.

    A key of the user's own model or data (``model.width=8``), which no file has, gets its plus signs here; and flags
    come first, as Hydra's parser wants them.
    Other flags than ``--multirun`` (``--cfg job``, ``--help``) are left to Hydra, and so is the check to the job.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = [argument for argument in given if argument.startswith("-")]
    if set(flags) - {"-m", "--multirun"}:
        return
    overrides = [argument for argument in given if argument not in flags]
    added: set[str] = set()
    with readable_errors(), initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for number, (job, sweep) in enumerate(_jobs(config_name, overrides, multirun=bool(flags))):
            cfg, accepted = _composed(config_name, job)
            with _as_hydras_job(cfg, number):
                check(cfg, sweep=sweep)
            added |= {_key(old) for old, new in zip(job, accepted, strict=True) if old != new}
    if arguments is None:  # Hydra reads them next
        sys.argv[1:] = [*flags, *(f"++{each}" if _key(each) in added else each for each in overrides)]


def _jobs(config_name: str, overrides: Sequence[str], *, multirun: bool) -> Iterator[tuple[list[str], bool]]:
    parsed = _parse(overrides)
    # A file, such as hparams_search, may make it a sweep, so Hydra's own part is composed first.
    single = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    hydra_node = _composed(config_name, single)[0].hydra
    sweep = multirun or hydra_node.mode == RunMode.MULTIRUN
    if not sweep:
        yield list(overrides), False
        return
    swept = _parse([f"{key}={value}" for key, value in (hydra_node.sweeper.params or {}).items()])
    grid = str(hydra_node.sweeper._target_).endswith(".BasicSweeper")
    values = [_values(override, grid=grid) for override in [*swept, *parsed]]
    for combination in itertools.product(*values):
        yield list(combination), True


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
            parsed[-1].config_loader = GlobalHydra.instance().config_loader()  # where glob() finds its options
        except HydraException as error:
            raise ConfigError(f"{override}: cannot be read as an override, key=value ({error})") from error
    return parsed


def _values(override: Override, *, grid: bool) -> list[str]:
    """The overrides of a sweep's jobs in the place of one; of an interval its ends."""
    given, key = override.input_line or "", override.get_key_element()
    if not override.is_sweep_override():
        return [given]
    if not override.is_discrete_sweep():
        interval: Any = override.value()
        if grid:
            raise ConfigError(
                f"{given}: a grid needs a list of values, and an interval is not one. Give a list such as "
                f"{key}={interval.start:g},{interval.end:g}, or range(START,STOP,STEP); intervals are for sweepers "
                "that search, such as Hydra's plugin for Optuna (hydra/sweeper=optuna)."
            )
        return [f"{key}={interval.start}", f"{key}={interval.end}"]
    try:
        values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{given}: has no values to try ({error})") from error
    if not values:
        raise ConfigError(f"{given}: has no values to try, so no job would run")
    return values


@contextmanager
def _as_hydras_job(cfg: DictConfig, number: int) -> Iterator[None]:
    """Inside, ``cfg`` is without Hydra's own part, which its values may name, as in the job: ``${hydra:job.num}``."""
    with read_write(cfg.hydra), open_dict(cfg.hydra):
        cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        cfg.hydra.runtime.output_dir = "."  # there is none yet
    told = HydraConfig.instance()
    told.set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    try:
        yield
    finally:
        told.cfg = None


def _composed(config_name: str, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The configuration, and the overrides that make it: a key that no file has is let through, for the check."""
    wanted = list(overrides)
    for _ in range(len(wanted) + 1):  # Hydra names one unknown key at a time
        try:
            return compose(config_name, wanted, return_hydra_config=True), wanted
        except (HydraException, OmegaConfBaseException) as error:
            unknown = re.search(r"Could not override '([^']+)'", str(error))
            forced = [_forced(item, unknown.group(1)) for item in wanted] if unknown else wanted
            if forced == wanted:
                raise ConfigError(str(error).partition("Config search path")[0]) from error
            wanted = forced
        # Raised inside of OmegaConf, where null is given members, and of Hydra, for a group that is null.
        except (AssertionError, AttributeError, ValueError) as error:
            said = str(error).partition("\n")[0]
            raise ConfigError(f"{' '.join(wanted)}: cannot be put into the configuration ({said})") from error
    raise AssertionError("every override is forced at most once")


def _forced(override: str, key: str) -> str:
    return f"++{override}" if _key(override) == key else override


def _key(override: str) -> str:
    return override.split("=", 1)[0]

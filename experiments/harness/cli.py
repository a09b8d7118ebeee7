"""The command line of a program of several studies: their names, and `key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.harness.settings import ConfigError, check_keys


def read_studies(
    arguments: Sequence[str], studies: Sequence[str], sizes: Mapping[str, Mapping[str, Any]], schema: type
) -> tuple[list[str], DictConfig]:
    """Names of studies (all of them if none is given), and the settings.

    Args:
        arguments: of the command line.
        studies: all that there are.
        sizes: the settings by `size`, of which ``full`` is the default.
        schema: a dataclass with the keys, their types and limits.

    Raises:
        ConfigError: an unknown study or key, or a value that is impossible.
    """
    words = [argument for argument in arguments if "=" not in argument]
    for word in words:
        if word not in studies:
            raise ConfigError(f"{word}: there is no such study; choose from {', '.join(studies)}")
    try:
        given = OmegaConf.from_dotlist([argument for argument in arguments if "=" in argument])
        cfg = OmegaConf.merge(sizes.get(str(given.get("size", "full")), sizes["full"]), given)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ConfigError(f"{' '.join(arguments)}: cannot be read ({error}); write key=value") from error
    assert isinstance(cfg, DictConfig)
    check_keys(cfg, schema, "")
    return [name for name in studies if name in words or not words], cfg


def check_list(cfg: DictConfig, key: str, example: object) -> None:
    """Raise a ConfigError unless a setting is a list of one or more different entries."""
    if not isinstance(cfg[key], ListConfig) or not cfg[key]:
        raise ConfigError(f"{key}={cfg[key]}: must be a list of one or more, e.g. {key}={example}")
    if len(set(cfg[key])) < len(cfg[key]):
        raise ConfigError(f"{key}={list(cfg[key])}: an entry stands there twice; name each once")


def check_out(cfg: DictConfig, results: Path, *, small: str, called: str) -> None:
    """Raise a ConfigError unless results can be written to `out`, which is not the record where `size` is ``small``."""
    out = Path(cfg.out)
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"out={cfg.out}: {existing} is a file, and a folder is needed; choose another, out=FOLDER")
    if cfg.size == small and out.resolve() == results:
        raise ConfigError(f"out={cfg.out}: {called} must not stand among the results; give out=FOLDER")

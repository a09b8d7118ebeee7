"""Composes configurations as on the command line, without starting anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.app.build import CONF

Compose = Callable[..., DictConfig]


@cache
def _of_files(config_name: str, *chosen: str) -> DictConfig:
    """The configuration with these options of groups; a fifth of a second for Hydra."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(config_name, list(chosen))


def configuration(*overrides: str, config_name: str = "train") -> DictConfig:
    """The configuration of a command line without sweeps.

    Hydra composes the same files once; values are put in afterwards, read by its parser.
    """
    chosen = [item for item in overrides if (CONF / item.partition("=")[0]).is_dir()]
    made = copy.deepcopy(_of_files(config_name, *chosen))
    values = OverridesParser.create().parse_overrides([item for item in overrides if item not in chosen])
    with open_dict(made):
        for override in values:
            OmegaConf.update(made, override.key_or_group, override.value())
    return made


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compose:
    """``composed("strategy=ddp", ...)``: the configuration of ``train.py`` with these overrides.

    The working directory has a folder ``images`` of two classes.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        (place / "empty.png").touch()

    def make(*overrides: str, config_name: str = "train") -> DictConfig:
        return configuration(f"output_dir={tmp_path}", *overrides, config_name=config_name)

    return make

"""Composes configurations as on the command line, without starting anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.app.build import CONF

Compose = Callable[..., DictConfig]


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
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose(config_name, [f"output_dir={tmp_path}", *overrides])

    return make

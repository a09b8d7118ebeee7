"""The names that ``Trainer(strategy=...)`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import StrategyRegistry

from resist_lightning import ISTStrategy, LocalSGDStrategy, ResISTStrategy
from resist_lightning.strategies.launching.launchers import ScriptLauncher
from resist_lightning.strategies.launching.processes import ProcessLauncher

NAMES = [
    (face + suffix, strategy, start_method)
    for face, strategy in (("resist", ResISTStrategy), ("ist", ISTStrategy), ("local_sgd", LocalSGDStrategy))
    for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork"))
]


@pytest.mark.parametrize(("name", "strategy", "start_method"), NAMES)
def test_a_name_gives_its_strategy_and_launcher(
    name: str, strategy: type, start_method: str, trainer_with: Callable[..., L.Trainer]
) -> None:
    for spelling in (name, name.upper()):
        trainer = trainer_with(spelling)

        assert type(trainer.strategy) is strategy
        assert type(trainer.strategy.launcher) is (ScriptLauncher if start_method == "popen" else ProcessLauncher)
        assert trainer.strategy._start_method == start_method
        assert trainer.strategy.launcher.is_interactive_compatible == (start_method == "fork")
        assert trainer.world_size == 2


def test_no_name_is_taken_for_one_of_ddp() -> None:
    """Lightning tests for MPS by looking for "ddp" in the name."""
    ours = [name for name in StrategyRegistry if name.startswith(("resist", "ist", "local_sgd"))]
    assert len(ours) == len(NAMES) == 12
    assert not any("ddp" in name for name in ours)


@pytest.mark.parametrize("strategy", [face(local_steps=7) for face in (ResISTStrategy, ISTStrategy, LocalSGDStrategy)])
def test_an_object_is_taken_as_it_is(strategy: Any, trainer_with: Callable[..., L.Trainer]) -> None:
    trainer = trainer_with(strategy)

    assert trainer.strategy is strategy
    assert trainer.strategy.config.local_steps == 7


def test_a_name_has_the_defaults_of_its_class(trainer_with: Callable[..., L.Trainer]) -> None:
    assert trainer_with("resist").strategy.config == ResISTStrategy().config
    assert trainer_with("ist").strategy.config == ISTStrategy().config
    assert trainer_with("local_sgd").strategy.config == LocalSGDStrategy().config


@pytest.mark.parametrize("name", ["resist", "ist_spawn", "auxnet", "local_sgd_notebook"])
def test_fabric_is_told_of_the_engine(name: str) -> None:
    """Up to version 0.1 Fabric's error said that the name is invalid."""
    with pytest.raises(ValueError, match=r"works only with Trainer.*engine\.after_step\(\).*docs/tools\.md#fabric"):
        L.Fabric(strategy=name, accelerator="cpu", devices=2)

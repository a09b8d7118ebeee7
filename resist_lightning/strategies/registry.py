"""Registers the names for ``Trainer(strategy=...)``, with the same suffixes as Lightning's ``ddp``."""

from __future__ import annotations

import sys
from typing import Any

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from resist_lightning.strategies.auxnet import AuxNetStrategy
from resist_lightning.strategies.ist import ISTStrategy
from resist_lightning.strategies.local_sgd import LocalSGDStrategy
from resist_lightning.strategies.resist import ResISTStrategy

_STRATEGIES = (ResISTStrategy, ISTStrategy, AuxNetStrategy, LocalSGDStrategy)
_LAUNCHERS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register_strategies() -> None:
    """Register ``resist``, ``ist``, ``auxnet``, ``local_sgd``, and each with ``_spawn``, ``_fork``, ``_notebook``."""
    for strategy in _STRATEGIES:
        for suffix, start_method in _LAUNCHERS.items():
            StrategyRegistry.register(
                strategy.strategy_name + suffix,
                strategy,
                description=f"{strategy.__name__} with start_method={start_method!r}",
                override=True,
                start_method=start_method,
            )
    _refuse(
        STRATEGY_REGISTRY,
        "this strategy works only with Trainer. With Fabric use the engine: let Fabric start the workers "
        "(Fabric(devices=2), without a strategy of ours), do not pass the network to fabric.setup(), and call "
        "engine.after_step() after optimizer.step(); docs/tools.md#fabric has such a program.",
    )
    other: Any = sys.modules.get("pytorch_lightning.strategies")  # not imported where the user has not
    if other is not None:
        _refuse(
            other.StrategyRegistry,
            "resist-lightning works with `import lightning as L`, whose classes differ from those of "
            "`pytorch_lightning`. Use lightning.Trainer, and lightning.LightningModule for your module.",
        )


def _refuse(registry: Any, why: str) -> None:
    """Register the names where they cannot work, so that they raise a ValueError with the way out."""

    def refuse(**_: Any) -> None:
        raise ValueError(why)

    for strategy in _STRATEGIES:
        for suffix in _LAUNCHERS:
            registry.register(strategy.strategy_name + suffix, refuse, override=True)

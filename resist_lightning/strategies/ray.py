"""The strategies in workers that Ray Train starts: ``from resist_lightning.strategies.ray import RayResISTStrategy``.

The only module that imports Ray (the package's extra ``[ray]``); the package does not import it.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import ray.train
from ray.train.lightning import RayDDPStrategy, prepare_trainer
from typing_extensions import override

from resist_lightning.methods.config import CommonConfig
from resist_lightning.strategies.auxnet import AuxNetStrategy
from resist_lightning.strategies.base import SubnetStrategy
from resist_lightning.strategies.ist import ISTStrategy
from resist_lightning.strategies.launching.checks import check_run
from resist_lightning.strategies.local_sgd import LocalSGDStrategy
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.resist import ResISTStrategy

__all__ = ["RayAuxNetStrategy", "RayISTStrategy", "RayLocalSGDStrategy", "RayResISTStrategy"]


class OnRay(SubnetStrategy, RayDDPStrategy):
    """Adapts the strategies to Ray, which has started the workers, chosen their devices and made their group."""

    def __init__(self, config: CommonConfig, options: StrategyOptions, data: Literal["shard", "copy", "same"]) -> None:
        _check_options(options)
        super().__init__(config, options, data)
        self.saver.collected = True

    @property
    @override
    def num_processes(self) -> int:
        """Processes of this host. Lightning would count this process's devices, and Ray gives it one."""
        return int(ray.train.get_context().get_local_world_size())

    @override
    def check_before_launch(self, trainer: pl.Trainer) -> None:
        """Called by the launcher, before the training: raise for runs that cannot work."""
        prepare_trainer(trainer)  # refuses a Trainer without RayLightningEnvironment
        check_run(trainer, self.config, self.options, self.world_size)


class RayResISTStrategy(ResISTStrategy, OnRay):
    """:class:`ResISTStrategy` for workers of Ray Train, with its options."""


class RayISTStrategy(ISTStrategy, OnRay):
    """:class:`ISTStrategy` for workers of Ray Train, with its options."""


class RayAuxNetStrategy(AuxNetStrategy, OnRay):
    """:class:`AuxNetStrategy` for workers of Ray Train, with its options."""


class RayLocalSGDStrategy(LocalSGDStrategy, OnRay):
    """:class:`LocalSGDStrategy` for workers of Ray Train, with its options."""


def _check_options(options: StrategyOptions) -> None:
    """Refuse options of tasks that Ray takes over.

    Raises:
        ValueError: with the way out.
    """
    usual = type(options)()
    instead: dict[str, Any] = {
        "start_method": "Ray starts the workers: leave it out.",
        "parallel_devices": "Ray chooses the workers' devices: set them in ScalingConfig.",
        "process_group_backend": "Ray makes the process group: TorchTrainer(torch_config=TorchConfig(backend=...)).",
        "timeout": "Ray makes the process group: TorchTrainer(torch_config=TorchConfig(timeout_s=...)).",
        "snapshots": "Ray restarts the workers from the checkpoint that RayTrainReportCallback reported last.",
        "on_worker_loss": "Ray decides how many workers it restarts: ScalingConfig(num_workers=(MIN, MAX)).",
    }
    for name, text in instead.items():
        value = getattr(options, name)
        if value != getattr(usual, name):
            raise ValueError(f"{name}={value!r} has no effect under Ray. {text}")

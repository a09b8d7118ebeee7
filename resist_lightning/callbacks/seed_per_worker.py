"""A callback that gives every worker random numbers of its own."""

from __future__ import annotations

import hashlib

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from resist_lightning.methods.config import CommonConfig
from resist_lightning.state.random_state import seed_generators


class SeedPerWorker(Callback):
    """Gives every worker its own random numbers: for dropout, augmentation and all else drawn in training.

    Without it workers that are seeded alike draw alike, as under DDP. When ``fit`` starts, the global generators of
    Python, NumPy and torch are seeded by ``(seed, rank)``; the initial weights stay those of worker 0. A run that
    resumes exactly continues with the random state that each worker had.

    Args:
        seed: not below 0; the same on all workers.

    Raises:
        ValueError: if ``seed`` is below 0; when ``fit`` starts, under AuxNet, whose workers must draw alike.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0.")
        self._seed = seed

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a strategy whose workers must draw alike."""
        config = getattr(trainer.strategy, "config", None)
        if stage == "fit" and trainer.world_size > 1 and isinstance(config, CommonConfig) and not config.trains_alone:
            raise ValueError(
                "SeedPerWorker contradicts AuxNet: its workers train stages of one network on the same batches, so "
                "they must draw the same random numbers. Remove the callback."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed this worker's generators."""
        # A hash: seeds of workers and of runs that are close together give unrelated numbers.
        digest = hashlib.sha256(repr((self._seed, trainer.global_rank)).encode()).digest()
        seed_generators(int.from_bytes(digest[:8], "big"))

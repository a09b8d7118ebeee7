"""Lightning's part in each handshake: the settings, stop flags and loss scales that workers compare."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from resist_lightning.checks.handshake import Host
from resist_lightning.strategies.launching.signals import Signals


class LightningHost(Host):
    """Compares stop requests between workers; agrees on signals and on the loss scale of mixed precision."""

    def __init__(self, trainer: pl.Trainer, signals: Signals, data: str = "shard", members: int = 1) -> None:
        self._trainer = trainer
        self._signals = signals
        self._data = data
        self._members = members  # processes of each worker

    @override
    def settings(self) -> dict[str, str]:
        """Settings of the trainer that all workers must share."""
        trainer = self._trainer
        names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
        found = {name: str(getattr(trainer, name)) for name in names}
        divides = self._data == "shard" or (self._data == "copy" and self._members > 1)
        if divides and trainer._accelerator_connector.use_distributed_sampler:
            # Lightning's sampler shuffles by this seed: with another one on each process, shards would overlap.
            found["seed_everything"] = os.environ.get("PL_GLOBAL_SEED", "not called")
        return {**found, "data": self._data}

    @override
    def stop_flag(self) -> int:
        """1 if something in this worker's program has asked its trainer to stop."""
        return int(self._trainer.should_stop)

    @override
    def report(self) -> list[float]:
        """The loss scale, or 0 without one, and the requests of signals."""
        scaler = self._scaler()
        scale = scaler.get_scale() if scaler is not None else 0.0
        return [float(scale), float(self._signals.requests)]

    @override
    def on_reports(self, reports: list[list[float]]) -> None:
        """Take the requests that signals have made on all workers."""
        self._signals.on_requests(int(report[1]) for report in reports)

    @override
    def agree(self, reports: list[list[float]]) -> None:
        """Take the smallest loss scale: workers skip different steps, so their scales drift apart.

        Where a round ends, all gradients were used. With manual optimization that is not known, and gradients that are
        being accumulated must have one scale; every worker then keeps its own, which divides out.
        """
        scaler = self._scaler()
        smallest = min(report[0] for report in reports)
        if scaler is None or not self._trainer.lightning_module.automatic_optimization:
            return
        if smallest > 0 and smallest != scaler.get_scale():
            scaler.load_state_dict({**scaler.state_dict(), "scale": smallest})  # update() fails before the first step

    def _scaler(self) -> Any | None:
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

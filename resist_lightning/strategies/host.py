"""What Lightning tells the engine, and hears from it, at each sync."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from resist_lightning.meeting import Host


class LightningHost(Host):
    """Compares stop requests between workers and agrees on the loss scale of mixed precision.

    Args:
        trainer: the trainer of this worker.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    @override
    def stop_flag(self) -> int:
        """Whether this worker's trainer was asked to stop."""
        return int(self._trainer.should_stop) + 2 * int(getattr(self._trainer, "received_sigterm", False))

    @override
    def report(self) -> list[float]:
        """The loss scale, or 0 without one."""
        scaler = self._scaler()
        return [float(scaler.get_scale()) if scaler is not None else 0.0]

    @override
    def learn(self, reports: list[list[float]]) -> None:
        """Take the smallest loss scale: workers skip different steps, so their scales drift apart."""
        scaler = self._scaler()
        smallest = min(report[0] for report in reports)
        if scaler is not None and smallest > 0 and smallest != scaler.get_scale():
            scaler.update(smallest)

    def _scaler(self) -> Any | None:
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

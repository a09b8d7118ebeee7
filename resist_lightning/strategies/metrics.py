"""Reads the metrics of an evaluation, when its end is reached."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def metrics_of_evaluation(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """What the evaluation that runs has logged so far, with any of its loaders and in its hooks.

    Unlike ``trainer.callback_metrics``, nothing of the training, and of earlier evaluations.

    Returns:
        By name, for callbacks (``callback``) and for loggers (``log``).
    """
    connector: Any = trainer._logger_connector
    results: Any = trainer._results
    current = results.dataloader_idx
    found: dict[str, dict[str, Any]] = {"callback": {}, "log": {}}
    try:
        # Lightning gives those of one loader at a time; in this order, as pending ones are reduced over the workers.
        for loader in dict.fromkeys(metric.meta.dataloader_idx for metric in results.values()):
            results.dataloader_idx = loader
            metrics = connector.metrics
            for kind, values in found.items():
                values.update(metrics[kind])
    finally:
        results.dataloader_idx = current
    return found

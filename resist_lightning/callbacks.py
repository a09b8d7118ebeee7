"""Callbacks that observe and report; they decide nothing and send nothing."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn
from typing_extensions import override

from resist_lightning.accounting import TRAINING_KINDS, ddp_bytes, local_sgd_bytes
from resist_lightning.engine import Engine
from resist_lightning.ist.layout import NeuronLayout
from resist_lightning.layout import Layout
from resist_lightning.rounds import Clock
from resist_lightning.strategies.subnet import SubnetStrategy

SUMMARY_FILE = "resist_summary.json"
SHOWN_NEURONS = 64
SHOWN_ROUNDS = 60
"""How much of a partition of neurons the summary has."""


class RoundMonitor(Callback):
    """Logs round, share of time in sync and bytes per round, and writes a summary at the end of ``fit``.

    Logged to the trainer's loggers, from worker 0: ``sync/round``, ``sync/share_of_time`` (of the time in batches, 0 to
    1) and ``sync/sent_MB_per_round`` (10^6 bytes); of stages also ``auxnet/mismatch_k`` (‖λ - Y‖ / ‖Y‖ at boundary k),
    ``auxnet/speedup_predicted`` and ``auxnet/speedup_measured``, which all workers find alike. The summary is
    ``resist_summary.json`` in the trainer's ``default_root_dir``.

    Args:
        every_n_rounds: log once in so many rounds, at least 1.

    Raises:
        ValueError: if ``every_n_rounds`` is below 1.
    """

    def __init__(self, every_n_rounds: int = 1) -> None:
        if every_n_rounds < 1:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be at least 1.")
        self._every_n_rounds = every_n_rounds
        self._batch_start = 0.0
        self._training_seconds = 0.0
        self._sent_by_round: list[list[int]] = []
        self._first: Clock | None = None
        self._seen_round = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count; say so where there is nothing to observe."""
        self._training_seconds, self._sent_by_round, self._first = 0.0, [], None
        if _engine(trainer) is None:
            rank_zero_warn(f"RoundMonitor has nothing to report under {type(trainer.strategy).__name__}.")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called just before the strategy syncs."""
        self._batch_start = time.perf_counter()
        engine = _engine(trainer)
        if self._first is None and engine is not None:  # a resumed run begins in a later round
            self._first, self._seen_round = copy.copy(engine.clock), engine.clock.round

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each batch; report once a round."""
        self._training_seconds += time.perf_counter() - self._batch_start
        engine = _engine(trainer)
        if engine is None or engine.clock.round == self._seen_round:
            return
        self._seen_round = engine.clock.round
        sent = sum(engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS)
        self._sent_by_round.append([engine.clock.round * engine.config.local_steps, sent])
        if len(self._sent_by_round) % self._every_n_rounds == 0:
            self._log(trainer, engine, sent)

    @override
    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the summary."""
        engine = _engine(trainer)
        if engine is not None and engine.sent_bytes_by_worker:
            path = Path(trainer.default_root_dir) / SUMMARY_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.summary(trainer.strategy, engine), indent=1) + "\n")

    def summary(self, strategy: Any, engine: Engine) -> dict[str, Any]:
        """What the run did: parameters held, seconds, bytes and partitions; see docs/how-it-works.md.

        Rounds, local steps and partitions are those of the whole run; seconds and bytes those since it was resumed.
        """
        layout, workers, clock = engine.layout, engine.collective.workers, engine.clock
        first = self._first or Clock(clock.local_steps)
        rounds = clock.round + (clock.step > 0)
        each_round = [(layout.held(round), layout.held_parameters(round)) for round in range(rounds)]
        partitions, held = [row for row, _ in each_round], [row for _, row in each_round]
        full = sum(p.numel() for p in layout.module.parameters())
        averaged = sum(tensor.nbytes for tensor in [*layout.module.parameters(), *layout.module.buffers()])
        gradients = sum(p.nbytes for p in layout.module.parameters() if p.requires_grad)
        return {
            "strategy": strategy.strategy_name,
            "workers": workers,
            "rounds": rounds,
            "local_steps": clock.total_steps,
            "local_steps_per_round": clock.local_steps,
            "blocks": layout.parts(),
            "shared_parameters": sum(p.numel() for p in layout.shared.values() if isinstance(p, nn.Parameter)),
            "full_parameters": full,
            "held_parameters": held[-1] if held else [],
            "held_parameters_max": max((max(row) for row in held), default=full),
            "scale": layout.scale,
            "seconds": {
                "training": self._training_seconds,
                "sync": engine.seconds.sync,
                "observe": engine.seconds.observe,
            },
            "sent_bytes": engine.sent_bytes_by_worker,
            "ddp_bytes": ddp_bytes(gradients, workers, clock.total_steps - first.total_steps),
            "local_sgd_bytes": local_sgd_bytes(averaged, workers, clock.round - first.round),
            "partitions": partitions,
            "neurons": _neurons(layout, rounds),
            "sent_by_round": self._sent_by_round,
            "method": engine.summary,
        }

    def _log(self, trainer: pl.Trainer, engine: Engine, sent: int) -> None:
        metrics = {
            "sync/round": float(engine.clock.round),
            "sync/share_of_time": engine.seconds.sync / max(self._training_seconds, 1e-9),
            "sync/sent_MB_per_round": sent / len(self._sent_by_round) / 1e6,
            **engine.sync.metrics(),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def _neurons(layout: Layout, rounds: int) -> dict[str, Any] | None:
    """Who held which neuron of the first hidden layer: neurons at equal distances, in the first rounds."""
    if not isinstance(layout, NeuronLayout):
        return None
    layer = layout.neurons.layers[0]
    shown = range(0, layer.width, -(-layer.width // SHOWN_NEURONS))
    holders = []
    for round in range(min(rounds, SHOWN_ROUNDS)):
        held = layout.partition(round)[0].held
        holder = {neuron: worker for worker, neurons in enumerate(held) for neuron in neurons}
        holders.append([holder[neuron] for neuron in shown])
    return {"layer": layer.name, "width": layer.width, "shown": list(shown), "holders": holders}


def _engine(trainer: pl.Trainer) -> Engine | None:
    return trainer.strategy.engine if isinstance(trainer.strategy, SubnetStrategy) else None

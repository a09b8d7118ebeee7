"""A callback that shows and logs the rounds of a training, and writes a summary at its end."""

from __future__ import annotations

import copy
import json
import os
import time
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from resist_lightning.checks.alignment import Alignment
from resist_lightning.comm.byte_formulas import TRAINING_KINDS, ddp_bytes
from resist_lightning.engine.engine import Engine
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.picture import draw_partition
from resist_lightning.schedule.progress import Clock
from resist_lightning.strategies.base import SubnetStrategy

SUMMARY_FILE = "resist_summary.json"
DRAWN_AGAIN_ROUNDS = 1000
"""Of the rounds before a resume, the summary draws at most this many partitions again."""


class RoundMonitor(Callback):
    """Shows and logs each round while it trains, and writes a summary at the end of ``fit``. It sends nothing.

    The progress bar shows the round. Logged to the trainer's loggers, from worker 0:

    - ``sync/round``; ``sync/share_of_time`` (of the time in batches, 0 to 1);
    - ``sync/sent_MB_per_round`` (10^6 bytes), and of it each kind that was sent, as ``sync/hand_over_MB_per_round``;
    - ``sync/slowest_worker``, for which the others wait, and ``sync/slowest_step``, the mean time of its local steps in
      the last round against that of all workers (1: all are equally fast);
    - ``sync/alignment`` (cosine between worker 0's change of the shared parameters and the mean change of all workers:
      1 where they went the same way, about 1 / sqrt(workers) where they had nothing in common) and ``sync/change`` (the
      length of the mean change, as a share of the parameters' length); not with an outer optimizer, ``overlap`` or
      ``fragments``;
    - with ``overlap``, ``sync/overlap``: the local steps beside which the sync of this round runs;
    - to TensorBoard, every ``picture_every_n_rounds`` rounds, ``sync/partition``: the holders of each block;
    - of stages ``auxnet/mismatch_k`` (‖λ - Y‖ / ‖Y‖ at boundary k), ``auxnet/speedup_predicted`` and
      ``auxnet/speedup_measured``, which are equal on all workers.

    The summary is ``resist_summary.json`` in the trainer's ``default_root_dir``.

    Args:
        every_n_rounds: log once in so many rounds, at least 1.
        picture_every_n_rounds: log a picture once in so many rounds; 0: none. Needs matplotlib and a TensorBoardLogger.

    Raises:
        ValueError: if ``every_n_rounds`` is below 1, or ``picture_every_n_rounds`` below 0.
        ModuleNotFoundError: when ``fit`` starts, if pictures are requested and matplotlib is not installed.
    """

    def __init__(self, every_n_rounds: int = 1, picture_every_n_rounds: int = 0) -> None:
        if every_n_rounds < 1:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be at least 1.")
        if picture_every_n_rounds < 0:
            raise ValueError(f"picture_every_n_rounds={picture_every_n_rounds} must be at least 0.")
        self._every_n_rounds = every_n_rounds
        self._picture_every_n_rounds = picture_every_n_rounds
        self._reset()

    def _reset(self) -> None:
        """Forget the data of an earlier ``fit``."""
        self._alignment = Alignment()
        self._alignment_metrics: dict[str, float] = {}
        self._measured_round = -1
        self._batch_start = 0.0
        self._training_seconds = 0.0
        self._sync_seconds = 0.0  # up to the end of the last batch
        self._sent_by_round: list[list[int]] = []
        self._first: Clock | None = None
        self._seen_round = 0
        self._partitions: dict[int, str] = {}  # by round; as JSON, which takes a tenth of the memory
        self._held_parameters_max = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the counters; warn if the trainer has another strategy."""
        self._reset()
        if self._picture_every_n_rounds:
            _check_pictures(trainer)
        if _engine(trainer) is None:
            rank_zero_warn(f"RoundMonitor has nothing to report under {type(trainer.strategy).__name__}.")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start timing the batch."""
        engine = _engine(trainer)
        if engine is not None:
            self._training_seconds += self._seconds_between_batches(engine)
        self._batch_start = time.perf_counter()  # the time of a sync is a part of the batch's
        if self._first is None and engine is not None:
            # Not in `on_train_start`, which comes before the engine's: a resumed run begins in a later round.
            self._first = copy.copy(engine.clock)
            self._seen_round = engine.clock.round
            self._note_partition(engine)
            self._show_round(pl_module, engine)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """After a sync, compare worker 0's change with the mean change; the optimizer has changed nothing yet."""
        engine = _engine(trainer)
        if engine is None or not _averages(engine):
            return
        if engine.clock.step > 0 or engine.clock.round == self._measured_round:
            return
        self._measured_round = engine.clock.round
        self._alignment_metrics = self._alignment.measure(_shared(engine))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample the weights at the end of a round; when a round has begun, note its partition and log."""
        self._training_seconds += time.perf_counter() - self._batch_start
        engine = _engine(trainer)
        if engine is not None:
            self._sync_seconds = engine.seconds.sync
        if engine is not None and engine.clock.due and _averages(engine):
            self._alignment.end(_shared(engine))  # before the sync: of the next batch, or of a validation before it
        if engine is None or engine.clock.round == self._seen_round:
            return
        self._seen_round = engine.clock.round
        self._note_partition(engine)
        self._show_round(pl_module, engine)
        # Evaluations and checkpoints are the user's choice, so their bytes are not the method's.
        sent = sum(engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS)
        self._sent_by_round.append([engine.clock.steps_before, sent])
        if len(self._sent_by_round) % self._every_n_rounds == 0:
            self._log(trainer, engine, sent)
        if self._picture_every_n_rounds and len(self._sent_by_round) % self._picture_every_n_rounds == 0:
            self._log_picture(trainer, engine)

    @override
    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the summary."""
        engine = _engine(trainer)
        if engine is None or not engine.sent_bytes_by_worker:
            return
        text = json.dumps(self.summary(trainer.strategy, engine), indent=1) + "\n"
        folder = trainer.default_root_dir
        path = os.path.join(folder, SUMMARY_FILE)
        try:
            system = get_filesystem(folder)  # the folder may be a URL
            system.makedirs(folder, exist_ok=True)
            with system.open(path, "w") as file:
                file.write(text)
        except OSError as error:
            rank_zero_warn(f"{path} could not be written ({error}). The training itself has succeeded.")

    def summary(self, strategy: Any, engine: Engine) -> dict[str, Any]:
        """Summary of the run: parameters held, seconds, bytes and partitions; see docs/how-it-works.md.

        Rounds, local steps and partitions are those of the whole run (partitions of rounds before it was resumed are
        empty from round 1000 on); seconds and bytes those since it was resumed.
        """
        layout, workers, clock = engine.layout, engine.collective.workers, engine.clock
        first = self._first or Clock(clock.local_steps)
        rule = engine.config.local_steps
        rounds = clock.round + (clock.step > 0)  # the end of a training may cut the last one short
        partitions = [self._partition(layout, round) for round in range(rounds)]
        held = layout.held_parameters(rounds - 1) if rounds else []
        parameters = list(layout.module.parameters())
        full = sum(parameter.numel() for parameter in parameters)
        shared = [tensor for tensor in layout.shared.values() if isinstance(tensor, nn.Parameter)]
        # Bytes of the alternatives for the same steps: local SGD averages buffers too, DDP gradients only.
        gradients = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
        return {
            "strategy": strategy.strategy_name,
            "workers": workers,
            "processes_per_worker": engine.collective.members,
            "rounds": rounds,
            "local_steps": clock.total_steps,
            "local_steps_per_round": rule if isinstance(rule, int) else str(rule),
            "blocks": layout.parts(),
            "shared_parameters": sum(parameter.numel() for parameter in shared),
            "full_parameters": full,
            "held_parameters": held,
            "held_parameters_max": max(self._held_parameters_max, *held) if held else full,
            "scale": layout.scaling.scale,
            "seconds": {
                "training": self._training_seconds + self._seconds_between_batches(engine),
                "sync": engine.seconds.sync,
                "observe": engine.seconds.observe,
            },
            "sent_bytes": engine.sent_bytes_by_worker,
            "inside_bytes": dict(engine.collective.inside_bytes),  # of worker 0's first process
            "ddp_bytes": ddp_bytes(gradients, workers, clock.total_steps - first.total_steps),
            "local_sgd_bytes": layout.local_sgd_bytes(clock.round - first.round) // layout.fragment_count,
            "partitions": partitions,
            "neurons": layout.holders_for_summary(rounds),
            "sent_by_round": self._sent_by_round,
            "method": engine.summary,
            "overlap": layout.overlaps.summary(),
            "fragments": layout.fragment_count,
        }

    def _seconds_between_batches(self, engine: Engine) -> float:
        """Seconds of a sync since the last batch: one that is due comes before a validation."""
        return engine.seconds.sync - self._sync_seconds

    def _note_partition(self, engine: Engine) -> None:
        """Keep the partition of this round, which was just drawn: drawing all of them at the end takes minutes."""
        if engine.collective.worker != 0:
            return  # worker 0 writes the summary
        layout, round = engine.layout, engine.clock.round
        self._partitions[round] = json.dumps(layout.held(round))
        self._held_parameters_max = max(self._held_parameters_max, *layout.held_parameters(round))

    def _partition(self, layout: Layout, round: int) -> list[Any]:
        """The partition of a round; the first rounds before the run was resumed are drawn again."""
        if round in self._partitions:
            found: list[Any] = json.loads(self._partitions[round])
            return found
        if round < DRAWN_AGAIN_ROUNDS:
            return layout.held(round)
        return [[] for _ in range(layout.workers)]

    def _show_round(self, pl_module: pl.LightningModule, engine: Engine) -> None:
        pl_module.log("round", float(engine.clock.round), prog_bar=True, logger=False)

    def _log(self, trainer: pl.Trainer, engine: Engine, sent: int) -> None:
        to_mb_per_round = 1 / len(self._sent_by_round) / 1e6
        by_kind = {kind: engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS}
        metrics = {
            "sync/round": float(engine.clock.round),
            "sync/share_of_time": engine.seconds.sync / max(self._training_seconds, 1e-9),
            "sync/sent_MB_per_round": sent * to_mb_per_round,
            **{f"sync/{kind}_MB_per_round": bytes * to_mb_per_round for kind, bytes in by_kind.items() if bytes},
            **{f"sync/{name}": value for name, value in self._alignment_metrics.items()},
            **_slowest(engine.step_seconds),
            **({"sync/overlap": float(engine.clock.overlap)} if engine.config.overlaps_syncs else {}),
            **engine.sync.metrics(),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=_step(trainer))

    @rank_zero_only
    def _log_picture(self, trainer: pl.Trainer, engine: Engine) -> None:
        if not isinstance(engine.layout, BlockLayout):
            return
        for logger in _tensor_boards(trainer):
            figure = draw_partition(engine.layout, rounds=1, first=engine.clock.round)
            logger.experiment.add_figure("sync/partition", figure, _step(trainer))


def _slowest(step_seconds: list[float]) -> dict[str, float]:
    """The slowest worker, for which the others wait, and its step time as a multiple of the mean of all."""
    if not step_seconds or not sum(step_seconds):
        return {}
    slowest = max(step_seconds)
    return {
        "sync/slowest_worker": float(step_seconds.index(slowest)),
        "sync/slowest_step": slowest * len(step_seconds) / sum(step_seconds),
    }


def _step(trainer: pl.Trainer) -> int:
    """The step under which Lightning next logs this batch's metrics: loggers drop metrics of earlier steps."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _shared(engine: Engine) -> list[Tensor]:
    """Parameters that train, and that all workers hold."""
    return [tensor for tensor in engine.layout.shared.values() if tensor.requires_grad]


def _averages(engine: Engine) -> bool:
    """Whether a round begins with the means of the workers' shared parameters."""
    config = engine.config
    return config.trains_alone and config.equal_after_sync and getattr(config, "outer", "none") == "none"


def _tensor_boards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _check_pictures(trainer: pl.Trainer) -> None:
    """Raise, or warn, where pictures are requested and cannot be logged."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("RoundMonitor(picture_every_n_rounds=...) needs matplotlib: pip install matplotlib")
    if not _tensor_boards(trainer):
        rank_zero_warn("RoundMonitor logs its pictures to a TensorBoardLogger, and the trainer has none.")


def _engine(trainer: pl.Trainer) -> Engine | None:
    return trainer.strategy.engine if isinstance(trainer.strategy, SubnetStrategy) else None

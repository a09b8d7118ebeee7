"""Lets worker 0 alone run validations and tests (``evaluate_on="first"``), while the others wait for its metrics.

::

    worker 0      on_validation_start | batches, hooks of batches and epochs | metrics ──►  on_validation_end
    the others    on_validation_start | wait                                 | ──► metrics  on_validation_end

Callbacks decide in ``on_validation_end`` whether to save and to stop, so all workers must have the same metrics there.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from resist_lightning.comm.alone import Apart
from resist_lightning.comm.members import default_collective
from resist_lightning.engine.engine import Engine
from resist_lightning.methods.config import CommonConfig
from resist_lightning.strategies.metrics import metrics_of_evaluation
from resist_lightning.strategies.patches import Patches, after, do_nothing


class FirstEvaluates:
    """Evaluation loops of a trainer that worker 0 runs alone.

    Collective: every worker must make it, in the same order.

    Args:
        trainer: of this worker.
        engine: of this worker, while it trains.
        patches: for as long as it lasts.
    """

    def __init__(self, trainer: pl.Trainer, engine: Callable[[], Engine | None], patches: Patches) -> None:
        self._trainer = trainer
        self._engine = engine
        self._patches = patches
        self._collective = default_collective()
        self._first = self._collective.worker == 0
        self._apart = Apart(self._collective.members)

    @property
    def alone(self) -> bool:
        """Whether this worker evaluates alone now, apart from the others."""
        return self._apart.entered

    def whole_data(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a sampler with which worker 0 gets all of the data, divided among its members."""
        members = self._collective.members
        return {"num_replicas": members, "rank": kwargs["rank"] % members}

    def set_up(self, strategy: Any, trainer: pl.Trainer) -> None:
        """Prepare for a validation or test outside of ``fit``; workers that do not evaluate need nothing."""
        if self._first:
            strategy.accelerator.setup(trainer)
            strategy.precision_plugin.convert_module(strategy.model)
            strategy.model_to_device()
            strategy.setup_precision_plugin()

    def patch_run(self, loop: Any) -> None:
        """Let a loop run on worker 0 alone."""
        if self._first:
            usual = loop._on_evaluation_start
            self._patches.replace(loop, "_on_evaluation_start", after(usual, self._apart.enter))
        else:
            self._patches.replace(loop, "_on_evaluation_epoch_start", do_nothing)
        run = loop.run
        self._patches.replace(loop, "run", lambda: self._run(loop, run))

    def patch(self, loop: Any) -> None:
        """Patch the run and the end of a loop that nobody else patches."""
        self.patch_run(loop)
        self.patch_end(loop)

    def patch_end(self, loop: Any) -> None:
        """Give all workers worker 0's metrics when a loop ends; to be called after all other patches of its end."""
        self._patches.replace(loop, "_on_evaluation_end", after(self._share, loop._on_evaluation_end))

    def remove(self) -> None:
        """Communicate with all workers again; called after an error too."""
        self._apart.leave()
        self._patches.remove()

    def _run(self, loop: Any, usual: Callable[[], Any]) -> Any:
        outputs = usual() if self._first else self._wait(loop)
        # Outputs are used only outside of `fit`, and have floats, which can be sent as they are.
        return outputs if self._trainer.state.fn == TrainerFn.FITTING else self._tell(outputs)

    def _wait(self, loop: Any) -> list[Any]:
        """Run a loop's bookkeeping on a worker that does not evaluate."""
        loop.setup_data()
        if loop.skip:
            return []
        loop.batch_progress.reset_on_run()
        batches = sum(loop.max_batches)
        if batches < float("inf") and hasattr(loop.batch_progress, "increment_by"):  # Lightning 2.5.1 and later
            loop.batch_progress.increment_by(int(batches), True)
        loop._has_run = not self._trainer.sanity_checking
        with torch.no_grad():
            loop.on_run_start()
            loop._on_evaluation_end()
            loop._on_evaluation_model_train()
        vars(self._trainer)["_last_val_time"] = time.monotonic()  # unknown to Lightning 2.5
        return []

    def _share(self) -> None:
        """Give all workers the metrics, written tensors and stop flag of worker 0's evaluation."""
        trainer, engine = self._trainer, self._engine()
        if not self._first:
            self._take(self._tell(None), engine)
            return
        metrics = metrics_of_evaluation(trainer)  # before it leaves: pending metrics are reduced here
        self._apart.leave()
        found = {
            "callback": {} if trainer.sanity_checking else metrics["callback"],
            "log": {} if trainer.sanity_checking else metrics["log"],
            "stop": trainer.should_stop,
            "swapped": engine is not None and engine.observation.own.swapped,
            "written": engine.observation.written_values() if engine is not None else {},
        }
        self._tell(found)

    def _take(self, found: dict[str, Any], engine: Engine | None) -> None:
        trainer = self._trainer
        connector: Any = trainer._logger_connector
        device = trainer.strategy.root_device
        for kind, metrics in (("callback", connector._callback_metrics), ("log", connector._logged_metrics)):
            for name, value in found[kind].items():
                metrics[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        trainer.should_stop = trainer.should_stop or found["stop"]
        if engine is not None:
            engine.observation.write(found["written"])
            if found["swapped"]:  # as worker 0 does then, before the hooks of the end
                engine.end_observation()

    def _tell(self, value: Any) -> Any:
        """Worker 0's ``value``, on all workers. Collective: every worker must call this."""
        buffer = io.BytesIO()
        if self._first:
            torch.save(value, buffer)
        texts = self._collective.gather_bytes(buffer.getvalue())
        return torch.load(io.BytesIO(texts[0]), map_location="cpu", weights_only=True)


def evaluate_alone(trainer: pl.Trainer, config: CommonConfig) -> FirstEvaluates | None:
    """Let worker 0 alone run ``trainer.validate`` and ``trainer.test``, if the settings say so.

    Collective: every worker must call this, in the same order.
    """
    if not config.first_evaluates or trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING):
        return None
    first = FirstEvaluates(trainer, lambda: None, Patches())
    first.patch(trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.test_loop)
    return first


def check_full_model(trainer: pl.Trainer, engine: Engine | None) -> None:
    """Refuse calls that need the full model on every worker, after a training that has left it on worker 0 alone.

    Raises:
        ValueError: for another ``fit`` and for ``predict``.
    """
    fn = trainer.state.fn
    if engine is None or not engine.ended_on_first or fn not in (TrainerFn.FITTING, TrainerFn.PREDICTING):
        return
    raise ValueError(
        f"trainer.{fn.value} needs the full model on every worker, but full_model_on='first' has left it on worker 0 "
        "alone. Set full_model_on='all', or load a checkpoint into a new module, with a new Trainer."
    )

"""The state of a worker's ``Trainer``: Lightning's own checkpoints hold worker 0's only, or none of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from resist_lightning.engine.engine import Engine
from resist_lightning.state.python_numbers import python_numbers
from resist_lightning.strategies.metrics import metrics_of_evaluation
from resist_lightning.strategies.saving.data_position import Position


class TrainerState:
    """The state of a worker's trainer for an exact resume.

    Attributes:
        dumping: whether Lightning is making a checkpoint that must not have the model.
    """

    def __init__(self, trainer: pl.Trainer, position: Position) -> None:
        self.position = position
        self.dumping = False
        self._trainer = trainer

    def of_worker(self, engine: Engine) -> dict[str, Any]:
        """This worker's resume state, for its own file: of the engine, and of the trainer."""
        return {**engine.resumption.state_dict(), "host": self.state_dict(engine)}

    def state_dict(self, engine: Engine) -> dict[str, Any]:
        """This trainer's resume state."""
        trainer = self._trainer
        # Gradients are state only while they are being added up over batches.
        manual = not trainer.lightning_module.automatic_optimization  # where only the module knows
        accumulating = manual or self._accumulates()
        gradients = engine.sync.gradients() if accumulating else {}
        return {
            "position": self.position.state(),
            "precision": trainer.precision_plugin.state_dict(),
            "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
            # Schedules that follow a metric differ where workers see different values of it.
            "schedules": [python_numbers(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            "passed_over": self._passed_over(),
            # A schedule may follow a metric of a validation before this batch. As it is: asking would compute more.
            "metrics": {name: value.cpu() for name, value in trainer._logger_connector._callback_metrics.items()},
        }

    def _accumulates(self) -> bool:
        """Whether the step is still to come for which the batches that are trained add up their gradients."""
        if not self.position.next_is_fetched:
            return self._trainer.fit_loop._should_accumulate()
        # Lightning counts the batch that has been fetched.
        return self.position.trained % self._trainer.accumulate_grad_batches != 0

    def _passed_over(self) -> list[list[Any]]:
        """The schedules that Lightning would skip if the run resumed here, and the metric that each follows.

        A ``ReduceLROnPlateau`` steps at the end of its epoch, after checkpoints of the last validation. A run that is
        resumed from one of these begins with the next epoch.
        """
        trainer = self._trainer
        progress: Any = trainer.fit_loop.epoch_progress.current
        ending = progress.completed < progress.ready == progress.started
        at_end = ending and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if not at_end or self.position.next_is_fetched or not trainer.lightning_module.automatic_optimization:
            return []
        # At the end of the epoch all metrics are those of the epoch; in the validation before it, only its own are.
        metrics: dict[str, Any] = {}
        if progress.processed == progress.ready:
            metrics = trainer.callback_metrics
        elif trainer.validating:
            metrics = metrics_of_evaluation(trainer)["callback"]
        found: list[list[Any]] = []
        for place, config in enumerate(trainer.lr_scheduler_configs):
            due = config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
            if config.reduce_on_plateau and due:
                metric = metrics.get(str(config.monitor))
                found.append([place, None if metric is None else float(metric)])
        return found

    def _step_passed_over(self, passed_over: list[list[Any]]) -> None:
        configs = self._trainer.lr_scheduler_configs
        for place, metric in passed_over:
            if place >= len(configs):  # there were more schedules
                continue
            scheduler = configs[place].scheduler
            if metric is None:
                rank_zero_warn(
                    f"the checkpoint was written before the metric of {type(scheduler).__name__} was known, so this "
                    "step of the scheduler is skipped: the learning rate may differ from the uninterrupted run's."
                )
            else:
                self._trainer.lightning_module.lr_scheduler_step(scheduler, metric)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`."""
        trainer = self._trainer
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        self._load_schedules(state["schedules"])
        # Earlier versions have noted neither of these.
        self._step_passed_over(state.get("passed_over", []))
        for name, value in state.get("metrics", {}).items():
            trainer._logger_connector._callback_metrics[name] = value.to(trainer.strategy.root_device)
        parameters = dict(trainer.lightning_module.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)
        # Last, as it sets the random state: nothing may draw between this and the first batch.
        self.position.restore(state["position"])

    def _load_schedules(self, states: list[dict[str, Any]]) -> None:
        """Load the states of schedules by position; a schedule that is new begins anew."""
        configs = self._trainer.lr_scheduler_configs
        if len(configs) != len(states):
            rank_zero_warn(
                f"the checkpoint has {len(states)} learning-rate schedule(s), and `configure_optimizers` returns "
                f"{len(configs)} here. They are resumed by position; one that is new starts from its beginning."
            )
        for config, schedule in zip(configs, states, strict=False):
            config.scheduler.load_state_dict(schedule)

    def checkpoint_without_model(self) -> dict[str, Any]:
        """Lightning's checkpoint without the model, as if the fetched batch were still to be fetched."""
        self.dumping = True
        try:
            with self.position.before_the_fetch():
                dumped = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        finally:
            self.dumping = False
        use_python_numbers(dumped)
        # Only load_from_checkpoint reads hyperparameters, and nothing loads a module from a snapshot.
        return {key: value for key, value in dumped.items() if "hparams" not in key and "hyper_parameters" not in key}

    def with_modes(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` with the changes of frozen parameters and modes since the run began."""
        changes = self.position.modes.changes()
        return {**state, "modes": changes} if state and changes else state


def use_python_numbers(checkpoint: dict[str, Any]) -> None:
    """Make the state of optimizers and schedules in Lightning's checkpoint loadable."""
    for key in ("optimizer_states", "lr_schedulers"):
        if key in checkpoint:
            checkpoint[key] = python_numbers(checkpoint[key])

"""The state of a worker's ``Trainer``: Lightning's own checkpoints hold worker 0's only, or none of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from resist_lightning.engine.engine import Engine
from resist_lightning.strategies.saving.data_position import Position


class TrainerState:
    """What a worker's trainer must get back to resume exactly.

    Attributes:
        dumping: whether Lightning is making a checkpoint that must not have the model.
    """

    def __init__(self, trainer: pl.Trainer, position: Position) -> None:
        self.position = position
        self.dumping = False
        self._trainer = trainer

    def of_worker(self, engine: Engine) -> dict[str, Any]:
        """What this worker alone has, for its own file: of the engine, and of the trainer."""
        return {**engine.resumption.state_dict(), "host": self.state_dict(engine)}

    def state_dict(self, engine: Engine) -> dict[str, Any]:
        """What this worker's trainer has."""
        trainer = self._trainer
        # Gradients are state only while they are being added up over batches.
        manual = not trainer.lightning_module.automatic_optimization  # where only the module knows
        accumulating = manual or trainer.fit_loop._should_accumulate()
        gradients = engine.sync.gradients() if accumulating else {}
        return {
            "position": self.position.state(),
            "precision": trainer.precision_plugin.state_dict(),
            "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
            # Schedules that follow a metric differ where workers see different values of it.
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        trainer = self._trainer
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        for config, schedule in zip(trainer.lr_scheduler_configs, state["schedules"], strict=True):
            config.scheduler.load_state_dict(schedule)
        parameters = dict(trainer.lightning_module.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)
        # Last, as it sets the random state: nothing may draw between this and the first batch.
        self.position.restore(state["position"])

    def checkpoint_without_model(self) -> dict[str, Any]:
        """What Lightning keeps in checkpoints beside the model, as if the fetched batch were still to be fetched."""
        self.dumping = True
        try:
            with self.position.before_the_fetch():
                dumped = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        finally:
            self.dumping = False
        # Only load_from_checkpoint reads hyperparameters, and nothing loads a module from a snapshot.
        return {key: value for key, value in dumped.items() if "hparams" not in key and "hyper_parameters" not in key}

    def with_modes(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` with what the program has frozen or unfrozen since the run began."""
        changes = self.position.modes.changes()
        return {**state, "modes": changes} if state and changes else state

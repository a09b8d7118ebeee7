"""A worker of `run.py`: trains on real images, and stops its clock while the full model is evaluated."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from experiments.app.classifier import LitClassifier
from experiments.app.quiet import hush
from experiments.data.folder import ImageFolder
from experiments.data.module import ArrayData, ImageData
from experiments.data.sets import Digits
from experiments.data.shaped import SpeechShaped
from experiments.harness.links.workers import Place
from experiments.links.rig import make_strategy
from experiments.networks import described
from experiments.trainers import quiet_trainer

# Data sets that need no folder, by the name that stands for it.
MADE: dict[str, type[ArrayData[Any]]] = {"digits": Digits, "speech_shaped": SpeechShaped}


class Stopwatch(L.Callback):
    """Seconds of training, at each evaluation.

    ::

        step ... step  sync, if one is due | full model, evaluation, back | step ...
        clock runs ────────────────────────┤ clock stands                 ├─ clock runs

    A sync that is due is done before the clock stops: it makes the model that is evaluated.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.curve: list[dict[str, float]] = []
        self._seconds = 0.0
        self._resumed: float | None = None
        self._began = False
        self._bytes_before: tuple[int, int] | None = None
        self._sent = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before the strategy's own, in which a sync happens that is due."""
        if not self._began:
            self._began = True
            self.place.ready()
        if self._resumed is None:
            self._resumed = time.perf_counter()
            self._bytes_before = self.place.bytes()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called before the strategy's own, which assembles the full model."""
        engine = getattr(trainer.strategy, "engine", None)
        if engine is not None:
            engine.sync_if_due()  # it makes the model that is evaluated: its seconds count
        if self._resumed is not None:
            self._seconds += time.perf_counter() - self._resumed
            now = self.place.bytes()
            if now is not None and self._bytes_before is not None:
                self._sent += now[0] - self._bytes_before[0]
        self._resumed = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        point = {"steps": trainer.global_step, "seconds": self._seconds, "kernel_sent_bytes": self._sent}
        self.curve.append({**point, "accuracy": float(trainer.callback_metrics["val/acc"])})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.place.measured()


def make_data(settings: dict[str, Any]) -> ArrayData[Any]:
    """A made data set, or a folder of images; all of the training but 2 % of it (the loaders want a hold-out)."""
    loading = {key: settings[key] for key in ("limit", "limit_test")}
    loading |= {"batch_size": settings["batch"], "holdout": 0.02, "drop_last": True}
    if settings["folder"] in MADE:
        return MADE[settings["folder"]](**loading)
    return ImageFolder(settings["folder"], cache_dir=settings["cache_dir"], **loading)


def main(place: Place, settings: dict[str, Any]) -> None:
    """Train once; report the curve."""
    hush()
    L.seed_everything(settings["seed"], verbose=False)
    data, stopwatch = make_data(settings), Stopwatch(place)
    trainer = quiet_trainer(
        make_strategy(settings["method"], settings, settings["local_steps"]), num_nodes=place.workers,
        max_steps=settings["steps"], max_epochs=-1, val_check_interval=settings["evaluate_every"],
        check_val_every_n_epoch=None, num_sanity_val_steps=0, callbacks=[stopwatch],
    )  # fmt: skip
    channels = data.in_channels if isinstance(data, ImageData) else None
    net = described(
        settings["network"], num_classes=data.num_classes, in_channels=channels, in_features=data.in_features
    )
    module = LitClassifier(net, data.num_classes, lr=settings["lr"])
    for stage in ("fit", "test"):
        data.setup(stage)
    # The test examples stand in the place of the validation's: no setting is chosen by them.
    trainer.fit(module, data.train_dataloader(), data.test_dataloader())
    place.report({"worker": place.worker, "curve": stopwatch.curve})

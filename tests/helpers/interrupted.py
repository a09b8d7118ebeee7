"""A notebook: the first fit would last for minutes and is interrupted from outside; then the user fits again."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from resist_lightning import ResISTStrategy
from tests.helpers.plain import Classifier, stream


class Slow(L.Callback):
    """Slows every batch down, and creates a file when the first is trained."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, *_: Any) -> None:
        Path(self.folder, "training").touch()
        time.sleep(0.2)


def fit(start_method: Any, steps: int, callbacks: list[L.Callback]) -> Classifier:
    module = Classifier()
    trainer = L.Trainer(
        strategy=ResISTStrategy(local_steps=3, min_blocks=1, start_method=start_method), accelerator="cpu", devices=2,
        max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, stream(0, steps))
    return module


def fit_twice(start_method: Any, folder: str) -> tuple[bool, int, bool]:
    """Returns whether the first fit was interrupted, the number of workers left, and whether the second trained."""
    interrupted = False
    try:
        fit(start_method, 1000, [Slow(folder)])
    except SystemExit:  # raised by Lightning when a fit is interrupted; a notebook continues
        interrupted = True
    left = len(multiprocessing.active_children())
    before = Classifier().state_dict()
    after = fit(start_method, 3, []).state_dict()
    return interrupted, left, any(not torch.equal(before[name], after[name]) for name in before)

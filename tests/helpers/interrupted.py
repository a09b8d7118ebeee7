"""A notebook in one file: ``python -m tests.helpers.interrupted START_METHOD FOLDER``.

The first fit would last for minutes and is interrupted from outside; then the user fits again.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from resist_lightning import ResISTStrategy
from tests.helpers.plain import Classifier, stream


class Slow(L.Callback):
    """Every batch takes a while; says when the first is trained."""

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    given, path = sys.argv[1:]
    interrupted = False
    try:
        fit(given, 1000, [Slow(path)])
    except SystemExit:  # how Lightning ends a fit that is interrupted; a notebook goes on
        interrupted = True
    state = "interrupted" if interrupted else "not interrupted"
    sys.stdout.write(f"{state}, {len(multiprocessing.active_children())} workers left\n")
    before = Classifier().state_dict()
    after = fit(given, 3, []).state_dict()
    changed = any(not torch.equal(before[name], after[name]) for name in before)
    sys.stdout.write("trained again\n" if changed else "not trained\n")

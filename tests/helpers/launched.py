"""A user's training script, for tests of launchers: ``python -m tests.helpers.launched FOLDER METHOD:NETWORK``.

After its own small network it trains one of ordinary size, to save the five seconds of another interpreter. Every
process that comes to the end writes its results to FOLDER.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from resist_lightning import ResISTStrategy
from tests.helpers import ordinary
from tests.helpers.plain import Classifier, held_out, stream

STEPS = 8


class Data(L.LightningDataModule):
    """This worker's part of the data."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return stream(self.trainer.global_rank, STEPS)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return held_out(self.trainer.global_rank)

    test_dataloader = val_dataloader


def train(start_method: Any, folder: str, module: Classifier) -> dict[str, Any]:
    """Fit with two workers, then evaluate; returns the results."""
    saving = ModelCheckpoint(folder, monitor="val/loss", filename=f"{start_method}-{{step}}")
    trainer = L.Trainer(
        strategy=ResISTStrategy(local_steps=3, min_blocks=1, start_method=start_method),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=Data())
    found: dict[str, Any] = {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "best": saving.best_model_path,
        "group left": torch.distributed.is_initialized(),
        "training": trainer.training,
    }
    if start_method == "popen":  # forked workers would be started again
        tested = trainer.test(module, datamodule=Data(), ckpt_path="best", verbose=False)[0]
        found["tested"] = {key.replace("test/", "val/"): value for key, value in tested.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    result = train("popen", str(folder), Classifier())
    worker = os.environ.get("LOCAL_RANK", "0")
    torch.save(result, folder / f"worker{worker}.pt")
    warnings.filterwarnings("ignore")
    method, network = sys.argv[2].split(":")
    found = ordinary.run(method, network, "popen", str(folder / method))
    if worker == "0":
        torch.save(found, folder / method / "found.pt")

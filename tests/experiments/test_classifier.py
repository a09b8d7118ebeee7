"""The classifier: the paper's schedule, logged metrics, and a clock that agrees with the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from experiments.app.classifier import LitClassifier, Schedule
from experiments.app.clock import CLOCK_FILE, Clock
from experiments.data import Fake


class Rates(Callback):
    """Remembers the learning rate and the names of logged metrics in every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.logged: list[set[str]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.logged.append(set(trainer.callback_metrics))


def fitted(folder: Path, schedule: Schedule, **trainer_options: Any) -> tuple[L.Trainer, Rates]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    module = LitClassifier(net, 10, lr=0.1, momentum=0.8, weight_decay=1e-3, schedule=schedule)
    rates = Rates()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[rates, Clock()], **trainer_options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Fake(train_size=89, test_size=10, image_size=8, batch_size=8))
    return trainer, rates


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 20}])
def test_the_rate_falls_at_half_and_at_three_quarters_of_the_steps(tmp_path: Path, options: Any) -> None:
    _, rates = fitted(tmp_path, "multistep", **options)
    assert rates.rates == pytest.approx([0.1] * 10 + [0.01] * 5 + [0.001] * 5)


def test_a_constant_rate_stays(tmp_path: Path) -> None:
    trainer, rates = fitted(tmp_path, "constant", max_epochs=2)
    assert rates.rates == [0.1] * 20
    group = trainer.optimizers[0].param_groups[0]
    assert (type(trainer.optimizers[0]), group["momentum"], group["weight_decay"]) == (torch.optim.SGD, 0.8, 1e-3)


def test_endless_training_cannot_have_a_schedule_in_shares(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.schedule=constant"):
        fitted(tmp_path, "multistep", max_epochs=-1)


def test_losses_and_accuracies_are_logged_under_their_names(tmp_path: Path) -> None:
    trainer, rates = fitted(tmp_path, "constant", max_epochs=1)
    assert rates.logged[0] == {"train/loss"}
    assert set(trainer.callback_metrics) == {"train/loss", "train/acc", "val/loss", "val/acc"}
    (tested,) = trainer.test(trainer.lightning_module, datamodule=Fake(test_size=10, image_size=8), verbose=False)
    assert set(tested) == {"test/loss", "test/acc"}


def test_accuracy_is_the_share_of_right_answers_and_loss_the_mean_over_images() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    module, data = LitClassifier(net, 10), Fake(test_size=30, image_size=8, eval_batch_size=7)
    data.setup("test")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    images = torch.cat([images for images, _ in data.test_dataloader()])
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    logits = net(images).detach()
    assert metrics["test/acc"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert metrics["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_the_clock_counts_what_the_trainer_did(tmp_path: Path) -> None:
    fitted(tmp_path, "constant", max_epochs=3)
    measured = json.loads((tmp_path / CLOCK_FILE).read_text())
    assert (measured["processes"], measured["steps"], measured["epochs"]) == (1, 30, 3)
    assert measured["training_seconds"] > 0
    assert measured["validation_seconds"] > 0


def test_a_checkpoint_needs_nothing_but_the_network_to_load(tmp_path: Path) -> None:
    trainer, _ = fitted(tmp_path, "constant", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    loaded = LitClassifier.load_from_checkpoint(tmp_path / "model.ckpt", net=net, weights_only=True)
    assert loaded.hparams["momentum"] == 0.8
    expected = trainer.lightning_module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())

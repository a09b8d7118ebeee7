"""An ordinary LightningModule that classifies images: nothing in it knows how it is distributed."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Schedule = Literal["multistep", "constant"]


class LitClassifier(L.LightningModule):
    """Cross entropy, SGD, and the paper's schedule: the rate is divided by 10 at 50 % and again at 75 % of
    the steps.

    Logs train/loss (each step) and train/acc (of the epoch) as this worker sees them, without communication,
    and val/loss, val/acc, test/loss, test/acc over all workers.

    Args:
        net: maps images (batch, channels, H, W) to logits (batch, num_classes).
        num_classes: number of classes.
        lr: initial learning rate.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        schedule: ``multistep`` (the paper's) or ``constant``.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        *,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = "multistep",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        # Not synchronised: a worker reports its own training, so that logging costs no message between two
        # syncs.
        self.train_acc = MulticlassAccuracy(num_classes, average="micro", sync_on_compute=False)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels)
        self.train_acc.update(logits.detach(), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", functional.cross_entropy(logits, labels), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        chosen = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=chosen["lr"],
            momentum=chosen["momentum"],
            weight_decay=chosen["weight_decay"],
        )
        if chosen["schedule"] == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                "optimizer.schedule=multistep needs to know the number of steps: set trainer.max_epochs or "
                "trainer.max_steps, or optimizer.schedule=constant"
            )
        # Not before the first step, however short the training is.
        milestones = [max(1, int(steps * share)) for share in (0.5, 0.75)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

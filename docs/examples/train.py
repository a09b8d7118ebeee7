"""A training script like any other: torchrun, SLURM or Lightning itself starts its processes."""

import argparse
import os

import lightning as L
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resist_lightning import ResISTStrategy
from resist_lightning.models import preact_resnet


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = preact_resnet(26, width_multiplier=1 / 16)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1, help="processes on each host")
    parser.add_argument("--nodes", type=int, default=1, help="hosts")
    parser.add_argument("--devices-per-worker", type=int, default=1, help="processes of each worker")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    L.seed_everything(1, workers=True)
    images, labels = torch.randn(2048, 3, 8, 8), torch.randint(10, (2048,))  # your data
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True, num_workers=1)

    # SLURM keeps a job's number when it requeues the job, which so finds its checkpoint; other jobs do not.
    folder = os.path.join("runs", os.environ.get("SLURM_JOB_ID", "by-hand"))
    trainer = L.Trainer(
        strategy=ResISTStrategy(local_steps=10, devices_per_worker=options.devices_per_worker),
        devices=options.devices,
        num_nodes=options.nodes,
        max_epochs=options.epochs,
        callbacks=[OnExceptionCheckpoint(folder)],  # written after SIGTERM too; the next fit resumes from it by itself
        default_root_dir=folder,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), loader)
    trainer.save_checkpoint(os.path.join(folder, "final.ckpt"))


if __name__ == "__main__":
    main()

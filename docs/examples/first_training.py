"""Two workers on this machine train a residual network on handwritten digits, each a part of it."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from resist_lightning import ResISTStrategy
from resist_lightning.callbacks import RoundMonitor
from resist_lightning.models import preact_resnet


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = preact_resnet(38, width_multiplier=0.25)  # any residual network will do

    def training_step(self, batch, index):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch, index):
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("test/accuracy", right, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    torch.set_num_threads(1)  # two workers share the cores
    L.seed_everything(0)  # all workers must draw the same split
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    digits = TensorDataset(pixels.repeat(1, 3, 1, 1), torch.tensor(labels))
    train, test = random_split(digits, [0.8, 0.2])

    trainer = L.Trainer(
        strategy=ResISTStrategy(local_steps=10),  # the one argument; "ddp" here is ordinary training
        accelerator="cpu",
        devices=2,
        max_epochs=8,
        callbacks=[RoundMonitor()],
        logger=False,
        enable_checkpointing=False,
    )
    module = Digits()
    trainer.fit(module, DataLoader(train, 16, shuffle=True))
    trainer.test(module, DataLoader(test, 90))


if __name__ == "__main__":
    main()

"""Fabric starts two workers and shards the data; the engine trains, in a loop that is otherwise Fabric's."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from resist_lightning import Config, Engine
from resist_lightning.models import preact_resnet


def train(fabric):
    torch.set_num_threads(1)  # two workers share the cores
    fabric.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    digits = TensorDataset(pixels.repeat(1, 3, 1, 1), torch.tensor(labels))
    loader = fabric.setup_dataloaders(DataLoader(digits, 16, shuffle=True))  # a shard per worker

    net = preact_resnet(26, width_multiplier=0.125).to(
        fabric.device
    )  # not fabric.setup(net), which would wrap it in DDP
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    engine = Engine(net, [optimizer], Config(local_steps=10))
    engine.start()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch, target in loader:
            net.train()
            optimizer.zero_grad()
            with fabric.autocast():
                loss = torch.nn.functional.cross_entropy(net(batch), target)
            loss.backward()
            optimizer.step()
            engine.after_step()
    engine.finish()  # now `net` is the full model, on every worker

    net.eval()
    with torch.no_grad():
        right = (net(digits.tensors[0]).argmax(1) == digits.tensors[1]).float().mean()
    fabric.print(f"accuracy {right:.2f}")


if __name__ == "__main__":
    fabric = L.Fabric(accelerator="cpu", devices=2)
    fabric.launch(train)

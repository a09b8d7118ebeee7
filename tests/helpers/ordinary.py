"""A user's script with a network of ordinary size.

``python -m tests.helpers.ordinary METHOD NETWORK START_METHOD FOLDER`` fits, validates, tests and predicts, and
resumes in a second run from a checkpoint of the first; with a CHECKPOINT as fifth argument it only resumes from that.
The results go to FOLDER/found.pt.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from resist_lightning import AuxNetStrategy, ISTStrategy, ResISTStrategy

CLASSES = 10
BATCH = 4
STEPS = 2


def make_network(name: str) -> nn.Module:
    """ResNet-50, a vision transformer, or a fully connected network; 25 million parameters or more."""
    torch.manual_seed(0)
    if name == "resnet50":
        return torchvision.models.resnet50(num_classes=CLASSES + 1000)
    if name == "vit":
        return torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=8, num_heads=8, hidden_dim=512, mlp_dim=2048, num_classes=CLASSES
        )
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 32 * 32, 3712),
        nn.ReLU(),
        nn.Linear(3712, 3712),
        nn.ReLU(),
        nn.Linear(3712, CLASSES),
    )


class Module(L.LightningModule):
    def __init__(self, network: str) -> None:
        super().__init__()
        self.net = make_network(network)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)


def make_strategy(method: str, start_method: Any) -> L.pytorch.strategies.Strategy:
    """ResIST for ResNet-50, IST for the fully connected network, AuxNet for the transformer."""
    if method == "resist":
        return ResISTStrategy(local_steps=1, min_blocks=1, blocks="layer3.*", start_method=start_method)
    if method == "ist":
        return ISTStrategy(local_steps=1, start_method=start_method)
    return AuxNetStrategy(cuts=["net.encoder.layers.encoder_layer_3"], warmup_steps=0, start_method=start_method)


def images(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(count, 3, 32, 32, generator=generator), torch.randint(CLASSES, (count,), generator=generator)
    return DataLoader(TensorDataset(*data), BATCH)


def make_trainer(method: str, start_method: str, folder: str, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        strategy=make_strategy(method, start_method), accelerator="cpu", devices=2, max_steps=STEPS,
        callbacks=list(callbacks), enable_checkpointing=bool(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip


def metrics_of(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def run(method: str, network: str, start_method: str, folder: str) -> dict[str, Any]:
    """Everything that a user does with a Trainer; returns the results."""
    module, held_out = Module(network), images(2 * BATCH)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(method, start_method, folder, saving)
    trainer.fit(module, images(2 * BATCH * STEPS), held_out)
    found: dict[str, Any] = {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "metrics": metrics_of(trainer),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tested": trainer.test(module, held_out, ckpt_path=f"{folder}/step={STEPS}.ckpt", verbose=False)[0]["loss"],
        "validated": trainer.validate(module, held_out, verbose=False)[0]["loss"],
    }
    predicted = trainer.predict(module, held_out)  # None from forked processes
    found["predicted"] = torch.cat(predicted) if predicted is not None else None
    found["resumed"] = resume(method, network, start_method, folder, f"{folder}/step=1.ckpt")["state"]
    return found


def resume(method: str, network: str, start_method: str, folder: str, checkpoint: str) -> dict[str, Any]:
    """Train the rest of a run from a checkpoint; returns weights and metrics."""
    module, trainer = Module(network), make_trainer(method, start_method, folder)
    trainer.fit(module, images(2 * BATCH * STEPS), images(2 * BATCH), ckpt_path=checkpoint)
    return {"state": module.state_dict(), "metrics": metrics_of(trainer)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    given = sys.argv[1:]
    torch.save(resume(*given) if len(given) == 5 else run(*given), Path(given[3], "found.pt"))

"""A small training, for workers of Ray and for others; does not import Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.plain import Classifier, batch_of

METHODS: dict[str, dict[str, Any]] = {
    "ResIST": {"local_steps": 3, "min_blocks": 1, "momentum": "travel"},
    "IST": {"local_steps": 3},
    "AuxNet": {"warmup_steps": 2, "check_every_n_steps": 4, "cuts": ["section3.2"]},
    "LocalSGD": {"local_steps": 3},
}
"""The methods, with their options."""

EPOCHS = 2
BATCHES = 8  # in an epoch, for each of two workers


def data() -> DataLoader[Any]:
    """The data of all workers, which Lightning splits between them."""
    images, labels = zip(*(batch_of(0, step) for step in range(2 * BATCHES // 2)), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=4, shuffle=True)


def fit(
    method: str, strategy: Callable[..., Any], folder: Path, ckpt_path: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train by a method; returns the weights.

    Args:
        method: a key of ``METHODS``.
        strategy: its class.
        folder: of the Trainer.
        ckpt_path: to resume from.
        options: further arguments of the Trainer.
    """
    torch.set_num_threads(1)
    L.seed_everything(1)
    module = Classifier("chain" if method == "IST" else "preact", dropout=0.1)
    trainer = L.Trainer(
        strategy=strategy(**METHODS[method]),
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}

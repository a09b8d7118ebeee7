"""From sections of a checked configuration to objects."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from experiments.app import schema
from experiments.app.classifier import LitClassifier
from experiments.app.launch import make
from experiments.data.module import ArrayData, FeatureData, ImageData
from experiments.harness.settings import ConfigError


def build_data(section: DictConfig) -> ArrayData[Any]:
    """The data module.

    Raises:
        ConfigError: a folder that cannot be used; nothing is decoded or downloaded yet.
    """
    data: ArrayData[Any] = make(section, "data")
    try:
        data.check()
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    return data


def build_module(cfg: DictConfig, data: ArrayData[Any]) -> LitClassifier:
    """The network that fits the data, in a plain LightningModule.

    Raises:
        ConfigError: a network for images, and data that are none.
    """
    if isinstance(data, FeatureData) and cfg.model._target_ in schema.IMAGE_MODELS:
        raise ConfigError(
            f"model._target_={cfg.model._target_}: is for images, and {type(data).__name__} gives rows of "
            f"{data.in_features} features; take a fully connected model (model=mlp), or images (data=cifar10)"
        )
    size = {"in_channels": data.in_channels} if isinstance(data, ImageData) else {}
    if cfg.model._target_ not in schema.IMAGE_MODELS:
        size = {"in_features": data.in_features}
    net = make(cfg.model, "model", num_classes=data.num_classes, **size)
    return LitClassifier(net, data.num_classes, **cfg.optimizer)


def build_strategy(section: DictConfig) -> Any:
    """What ``Trainer(strategy=...)`` takes."""
    devices = section.get("parallel_devices")
    extra = {"parallel_devices": [torch.device(name) for name in devices]} if devices else {}
    return make(section, "strategy", **extra)

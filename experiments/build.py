"""From sections of a checked configuration to objects."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from experiments.checks import ConfigError
from experiments.classifier import LitClassifier
from experiments.data.module import ImageData
from experiments.launch import make


def build_data(section: DictConfig) -> ImageData:
    """The data module.

    Raises:
        ConfigError: a folder that cannot be used; nothing is decoded or downloaded yet.
    """
    data: ImageData = make(section, "data")
    try:
        _ = data.num_classes  # a folder of images is listed for this, so that a wrong one is refused at once
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    return data


def build_module(cfg: DictConfig, data: ImageData) -> LitClassifier:
    """The network that fits the data, in a plain LightningModule."""
    net = make(cfg.model, "model", num_classes=data.num_classes, in_channels=data.in_channels)
    return LitClassifier(net, data.num_classes, **cfg.optimizer)


def build_strategy(section: DictConfig) -> Any:
    """What ``Trainer(strategy=...)`` takes."""
    devices = section.get("parallel_devices")
    extra = {"parallel_devices": [torch.device(name) for name in devices]} if devices else {}
    return make(section, "strategy", **extra)

"""The networks of the experiments on links: residual ones for ResIST, fully connected ones for IST."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from experiments.harness.settings import ConfigError, check_keys, limited
from experiments.networks import mlp
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.models import SECTIONS_OF_DEPTH, preact_resnet


@dataclass
class Residual:
    depth: int = limited(choices=tuple(SECTIONS_OF_DEPTH), hint="101 is the paper's of 41 million parameters")
    width_multiplier: float = limited(above=0, hint="1.0 is the paper's width")


@dataclass
class FullyConnected:
    depth: int = limited(least=2, hint="linear layers; 2 and 3 are the paper's")
    width: int = limited(least=1, hint="neurons of each hidden layer; 4096 and 8192 are the paper's")


def fully_connected(network: Mapping[str, Any]) -> bool:
    """Whether the section describes a network for IST."""
    return "width" in network


def make_network(
    network: Mapping[str, Any], *, num_classes: int, in_channels: int | None = 3, in_features: int | None = None
) -> nn.Module:
    """The network of a section, for images or for rows of features.

    Args:
        network: the section.
        num_classes: outputs.
        in_channels: of images, for a residual network.
        in_features: entries of an example, for a fully connected one.
    """
    if fully_connected(network):
        assert in_features is not None
        return mlp(in_features=in_features, num_classes=num_classes, depth=network["depth"], width=network["width"])
    width = network["width_multiplier"]
    return preact_resnet(network["depth"], num_classes=num_classes, width_multiplier=width, in_channels=in_channels)


def network_in_words(network: Mapping[str, Any]) -> str:
    """What a record was made with."""
    if fully_connected(network):
        return f"fully connected, {network['depth']} layers, hidden {network['width']}"
    return f"PreActResNet {network['depth']}, width x {network['width_multiplier']:g}"


def check_network(cfg: DictConfig) -> None:
    """Check the network, and that the methods can part it.

    Raises:
        ConfigError: at the first value that is impossible.
    """
    if not isinstance(cfg.network, DictConfig):
        keys = " or ".join(",".join(item.name for item in fields(kind)) for kind in (Residual, FullyConnected))
        raise ConfigError(f"network={cfg.network}: must be a section with {keys}")
    neurons = fully_connected(cfg.network)
    check_keys(cfg.network, FullyConnected if neurons else Residual, "network")
    wrong = [method for method in cfg.methods if method.startswith("resist" if neurons else "ist")]
    if wrong:
        reason = "residual blocks, and a fully connected network has none; take ist" if neurons else (
            "the neurons of fully connected networks (size=ist); take resist"
        )  # fmt: skip
        raise ConfigError(f"methods: {wrong[0]!r} parts {reason}")
    if neurons:
        if cfg.network.width < cfg.workers:
            raise ConfigError(
                f"network.width={cfg.network.width}: each of {cfg.workers} workers needs a neuron of every hidden layer"
            )
        return
    try:
        with torch.device("meta"):
            net = preact_resnet(cfg.network.depth, width_multiplier=cfg.network.width_multiplier)
        BlockLayout(net, Config(min_blocks=cfg.min_blocks), cfg.workers)
    except ValueError as error:
        raise ConfigError(str(error)) from error

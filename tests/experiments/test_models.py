"""The fully connected networks: their layers, and that IST divides them as in its paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from experiments.app.build import build_data, build_module
from experiments.harness.settings import ConfigError
from experiments.networks import mlp
from resist_lightning import NeuronConfig
from resist_lightning.methods.ist.layout import NeuronLayout
from tests.conf.conftest import Compose, composed

__all__ = ["composed"]


def weights(net: nn.Module) -> int:
    return sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize(
    ("depth", "width", "expected"), [(2, 4096, 16_920_576), (3, 8192, 100_950_016)]
)  # of IST's paper
def test_the_papers_speech_networks_have_its_weights(depth: int, width: int, expected: int) -> None:
    with torch.device("meta"):
        net = mlp(in_features=4096, num_classes=35, depth=depth, width=width, output_norm=True)
    assert weights(net) == expected
    assert sum(p.numel() for p in net.parameters()) == expected + 2 * (depth - 1) * width  # batch norm's; no bias


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, "Flatten Linear BatchNorm1d ReLU Linear"),
        ({"depth": 3}, "Flatten Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear"),
        ({"norm": "layer", "dropout": 0.1}, "Flatten Linear LayerNorm ReLU Dropout Linear"),
        ({"norm": "none", "output_norm": True}, "Flatten Linear ReLU Linear BatchNorm1d"),
    ],
)
def test_what_follows_what(options: dict[str, Any], modules: str) -> None:
    net = mlp(in_features=6, num_classes=3, width=8, **options)
    assert " ".join(type(module).__name__ for module in net) == modules
    assert net(torch.zeros(2, 1, 2, 3)).shape == (2, 3)
    linear = [module for module in net if isinstance(module, nn.Linear)]
    assert all((layer.bias is None) == (options.get("norm") != "none") for layer in linear[:-1])
    assert (linear[-1].bias is None) == options.get("output_norm", False)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_ist_divides_all_of_its_hidden_layers(norm: str) -> None:
    net = mlp(in_features=6, num_classes=3, depth=4, width=8, norm=norm, dropout=0.1)
    layout = NeuronLayout(net, NeuronConfig(min_share=0), 4)
    assert [layer.width for layer in layout.neurons.layers] == [8, 8, 8]
    per_neuron = 1 if norm == "none" else 2  # a bias, or the two of the norm
    assert layout.held_parameters(0) == [2 * 6 + 2 * 2 * 2 + 3 * 2 + 3 + per_neuron * 3 * 2] * 4


@pytest.mark.parametrize("options", [{"depth": 1}, {"width": 0}, {"norm": "group"}])
def test_what_is_no_such_network_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be (at least|one of)"):
        mlp(in_features=6, num_classes=3, **options)


def test_it_takes_images_and_features(composed: Compose) -> None:
    for data, entries in (("digits", 64), ("fake", 3 * 32 * 32), ("speech_shaped", 4096)):
        cfg = composed("model=mlp", "model.width=4", "strategy=ist", f"data={data}")
        made = build_data(cfg.data)
        module = build_module(cfg, made)
        assert made.in_features == module.net[1].in_features == entries


def test_a_network_for_images_names_the_one_for_features(composed: Compose) -> None:
    cfg = composed("data=speech_shaped")
    with pytest.raises(ConfigError, match=r"rows of 4096 features; take a fully connected model \(model=mlp\)"):
        build_module(cfg, build_data(cfg.data))

"""Networks of the zoo whose hidden neurons IST deals out by default: a subnet computes what the masked network does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.network.discovery import find_neurons
from tests.helpers import zoo
from tests.helpers.cutting import cut, masked

SAMPLE = ["torchvision resnet18", "torchvision vit", "by hand: U-Net", "by hand: DiT with adaLN"]
# No fx trace, or no layer whose neurons reach the next one alone.
REFUSED = {
    "torchvision fasterrcnn_resnet50_fpn", "timm resnetv2_50", "timm nf_resnet50", "timm dm_nfnet_f0", "timm eva02",
    "timm convnextv2", "timm mobilenetv4", "by hand: keywords and tuples", "by hand: GNN",
}  # fmt: skip


def check(name: str) -> None:
    network = zoo.build(name).double().eval()
    neurons = find_neurons(network)
    batch = tree_map(in_double, zoo.batch_of(name, 0, 0))
    kept = [list(range(0, layer.width, 2)) for layer in neurons.layers]
    subnet = cut(network, neurons, kept)
    with masked(network, neurons, kept) as whole, torch.no_grad():
        found, expected = outputs(subnet, batch), outputs(whole, batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs(network: Any, batch: zoo.Batch) -> list[Any]:
    return tree_leaves(network(*batch["inputs"], **batch["named"]))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_of_the_sample(name: str) -> None:
    check(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in zoo.NETWORKS if not name.startswith("transformers")])
def test_a_network(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(LayerSelectionError, match=r"cannot be|nothing to deal out"):
            check(name)
    else:
        check(name)

"""Networks of the zoo that AuxNet cuts by default, with default auxiliary networks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import StageConfig, StageSelectionError
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.network.aux_networks import make_aux_network
from tests.helpers import zoo
from tests.helpers.programs import ROOT

IMAGES_AND_IDS = [
    *("torchvision resnet18", "torchvision convnext", "torchvision vit", "torchvision swin", "torchvision maxvit"),
    *("timm vit", "timm deit", "timm swin", "timm convnext", "timm mixer", "timm eva02"),
    *("by hand: pre-norm encoder", "by hand: post-norm encoder", "by hand: residual MLP"),
]
NOT_TRACED = ["transformers ViT", "transformers GPT-2 (tied)", "transformers Llama", "transformers BERT"]


def check(network: nn.Module, x: Tensor) -> StageLayout:
    """Check that stages in sequence are the network, and that the boundary has an auxiliary network."""
    layout = StageLayout(network, StageConfig(method="al-net"), 2)
    layout.prepare(x, SoloCollective())
    assert layout.chain is not None
    (boundary,) = layout.boundary_shapes.boundaries
    auxiliary = make_aux_network(layout.config, layout.boundary_shapes.input, boundary, nonnegative=False, boundary=1)
    guess, multiplier = auxiliary(x)
    assert multiplier is not None
    assert guess.shape == multiplier.shape == (len(x), *boundary)

    # In training mode, as stages train: stochastic depth draws the same.
    torch.manual_seed(1)
    made = x
    for worker in range(2):
        made = layout.chain.stage(*layout.units(worker))(made)
    torch.manual_seed(1)
    assert torch.equal(made, network.train()(x))
    return layout


@pytest.mark.zoo
@pytest.mark.parametrize("name", IMAGES_AND_IDS)
def test_it_is_cut_and_has_auxiliary_networks_by_default(name: str) -> None:
    batch = zoo.batch_of(name, 0, 0)
    (x,) = batch["inputs"]
    check(zoo.build(name), x)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NOT_TRACED)
def test_a_model_of_transformers_is_refused_with_the_way_out(name: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(StageSelectionError, match=r"For a model of transformers, .* \(docs/auxnet\.md\)"):
        StageLayout(zoo.build(name), StageConfig(), 2)


@pytest.mark.zoo
def test_the_parts_of_a_model_of_transformers_one_after_another_are_cut() -> None:
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "auxnet.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Chain" in code]
    scope: dict[str, Any] = {"nn": nn, "Tensor": Tensor}
    exec(snippet, scope)
    model = zoo.build("transformers ViT")
    (x,) = zoo.batch_of("transformers ViT", 0, 0)["inputs"]

    network = scope["Chain"](model)
    layout = check(network, x)

    assert layout.chain is not None
    assert layout.chain.units[1:3] == ("layers.0", "layers.1")
    torch.testing.assert_close(network(x), model.eval()(x).logits)

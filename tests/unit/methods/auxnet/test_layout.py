"""Cuts of a network: tied weights, a user's auxiliary networks, cuts of other runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import StageConfig, StageSelectionError
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.network.aux_defaults import convolutions
from tests.helpers.nets import MlpBlock, mlp
from tests.helpers.plain import make_net


class Outside(nn.Module):
    """A network, and a layer outside of it."""

    def __init__(self, net: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.net, self.layer = net, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.net(x))


def tied() -> Outside:
    net = mlp(MlpBlock)
    module = Outside(net, nn.Linear(6, 4))
    module.layer.weight = net.get_submodule("head").weight  # type: ignore[assignment]
    return module


def make_layout(module: nn.Module, shape: tuple[int, ...] = (3, 8, 8), **options: Any) -> StageLayout:
    layout = StageLayout(module, StageConfig(network="net", **options), 2)
    layout.prepare(torch.randn(4, *shape), SoloCollective())
    return layout


# ------------------------------------------------------------------ tied weights


def test_a_weight_that_a_layer_outside_shares_is_refused() -> None:
    with pytest.raises(StageSelectionError, match=r"net\.head\.weight and layer\.weight are one tensor, inside"):
        StageLayout(tied(), StageConfig(network="net"), 2)


def test_a_weight_that_a_layer_outside_shares_is_no_matter_to_one_worker() -> None:
    StageLayout(tied(), StageConfig(network="net"), 1)


def test_another_name_of_a_module_of_the_network_is_not_refused() -> None:
    net = mlp(MlpBlock)
    module = Outside(net, net.get_submodule("head"))  # as in a module with a second reference to its head

    layout = StageLayout(module, StageConfig(network="net", cuts=["body.1"]), 2)

    assert "net.head.weight" in layout.stage_tensors(1)


def test_cuts_fit_one_number_of_workers() -> None:
    """A run that continued with other workers failed in each restart."""
    cut = StageLayout(mlp(MlpBlock), StageConfig(cuts=["body.1"]), 2)
    assert cut.fits_only_some() == "cuts=['body.1'] fits one number only: leave cuts out, and the stages are balanced."
    assert StageLayout(mlp(MlpBlock), StageConfig(), 2).fits_only_some() == ""


# ------------------------------------------------------------------ auxiliary networks


def test_where_there_is_no_default_auxiliary_network_it_is_refused_with_the_reason() -> None:
    video = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Conv3d(2, 1, 1))
    with pytest.raises(StageSelectionError, match=r"makes \(2, 2, 3, 3\) of \(1, 2, 3, 3\) .* Give `aux_network`"):
        make_layout(Outside(video, nn.Identity()), (1, 2, 3, 3), method="penalty")


def needs(channels: int, error: type[Exception], image: tuple[int, ...], boundary: tuple[int, ...]) -> nn.Module:
    if boundary[0] != channels:
        raise error(f"nothing is known of {boundary}")
    return convolutions(image, boundary, 2)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError, AssertionError, ZeroDivisionError])
@pytest.mark.parametrize(("channels", "end"), [(4, "net.section1.0"), (8, "net.section2.0")])
def test_where_the_users_auxiliary_network_fails_the_network_is_cut_elsewhere(
    channels: int, end: str, error: type[Exception]
) -> None:
    layout = make_layout(
        Outside(make_net(), nn.Identity()), method="penalty", aux_network=partial(needs, channels, error)
    )

    assert layout.chain is not None
    assert layout.chain.units[layout.cuts[0] - 1] == end


def test_a_users_auxiliary_network_that_always_fails_is_told() -> None:
    with pytest.raises(KeyError, match="nothing is known of"):
        make_layout(Outside(make_net(), nn.Identity()), method="penalty", aux_network=partial(needs, 5, KeyError))


# ------------------------------------------------------------------ tables of other runs


@pytest.mark.parametrize(
    "table",
    [
        {"blocks": 4, "workers": 2, "min_blocks": 1, "counts": [], "measured_from": 1, "seconds": []},  # resist, "auto"
        {"workers": 2, "cuts": []},
        {"workers": 2, "cuts": [99]},
        {"workers": 3, "cuts": [1]},
    ],
)
def test_a_table_that_says_nothing_of_these_cuts_changes_nothing(table: dict[str, Any]) -> None:
    layout, fresh = (StageLayout(make_net(), StageConfig(), 2) for _ in range(2))

    layout.load_state_dict(table, 3)

    assert layout.cuts == fresh.cuts


# ------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("options", "workers", "warned"),
    [
        ({"method": "al-store", "lambda_step": 1.0}, 3, True),
        ({"method": "al-store", "lambda_step": 1.0}, 2, False),
        ({"method": "al-store"}, 3, False),
        ({"method": "penalty", "lambda_step": 1.0}, 3, False),
    ],
)
def test_a_step_that_diverges_where_guesses_are_stored_warns(
    options: dict[str, Any], workers: int, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    StageLayout(mlp(MlpBlock), StageConfig(**options), workers).warn_about_settings()
    assert any("lambda_step=1 diverges" in str(warning.message) for warning in recwarn) == warned


def test_a_scripted_part_is_refused_by_name():
    net = mlp(MlpBlock)
    net.body[1] = torch.jit.trace(net.body[1], torch.ones(1, 6))
    with pytest.raises(StageSelectionError, match=r"'body\.1' is TorchScript"):
        StageLayout(net, StageConfig(), 2)
    StageLayout(net, StageConfig(), 1)


def wide(given: torch.Size, boundary: torch.Size) -> nn.Module:
    return nn.Identity()


def narrow(given: torch.Size, boundary: torch.Size) -> nn.Module:
    return nn.Identity()


def test_another_auxiliary_network_is_another_setting_of_a_checkpoint():
    identities = []
    for made in (None, wide, narrow, wide):
        identities.append(StageLayout(make_net(), StageConfig(method="penalty", aux_network=made), 2).identity())
    default, first, other, again = identities
    assert "aux_network" not in default
    assert first == again != other

"""The trial of candidates before the network has run: those that certainly are not residual are not chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.identity import residual_only
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.network import select_blocks
from tests.helpers.residual import WIDTH, Add, DiT, Mixer


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)


class LearnedSkip(Adding):
    """A factor on the skip, as the residual scale of CAFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.inside(x)


class OnTheWay(nn.Module):
    """A layer between two sums, as the convolution of TinyViT."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Add(nn.Conv2d(WIDTH, WIDTH, 1))
        self.between = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        return x + x.relu()


class ClassAttention(Adding):
    """Adds to its second argument, as the class attention of CaiT."""

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        return token + self.inside(torch.cat((token, x), 1)).mean(1, keepdim=True)


class Widens(nn.Module):
    """Narrower blocks between two of this class make them twins, as in NextViT."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.inside = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return x + self.inside(x)


class Masked(Adding):
    """Has a mask that is one where entries are kept, or where they are not."""

    def __init__(self, *, kept: bool) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.inside(x)
        return x * mask if self.kept else x * (1 - mask)


class Sized(Adding):
    """Needs numbers that nobody can guess."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return x.unflatten(1, (height, width)).flatten(1, 2) + self.inside(x)


@pytest.mark.parametrize("make", [LearnedSkip, OnTheWay, ClassAttention, Widens])
def test_what_returns_none_of_the_inputs_is_no_candidate(make):
    assert residual_only([block_at("0", make())]) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Add(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.GELU()),
        lambda: Masked(kept=True),
        lambda: Masked(kept=False),
        DiT,
        Mixer,
        Sized,
    ],
)
def test_what_returns_its_input_or_does_not_run_stays_a_candidate(make):
    block = block_at("0", make())
    before = torch.get_rng_state()
    assert residual_only([block]) == [block]
    assert torch.equal(torch.get_rng_state(), before)


class Stages(nn.Module):
    """One stage of residual blocks, and others."""

    def __init__(self, make=LearnedSkip) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(*(Add(nn.Linear(WIDTH, WIDTH)) for _ in range(3)))
        self.stage2 = nn.Sequential(*(make() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stage2(self.stage1(x))


def test_the_default_chooses_the_other_blocks_or_says_that_there_are_none():
    network = Stages()
    assert [block.name for block in select_blocks(network)] == ["stage1.0", "stage1.1", "stage1.2"]
    with pytest.raises(BlockSelectionError, match=r"stage2\.0-2 look residual, but do not return their input"):
        select_blocks(nn.ModuleDict({"stage2": network.stage2}))


def test_a_warning_names_what_is_left_out_where_little_is_partitioned():
    with pytest.warns(UserWarning, match=r"stage2\.0-2 look residual.*stay shared"):
        BlockLayout(Stages(), Config(min_blocks=1), workers=2).warn_about_settings()


@pytest.mark.parametrize(
    ("chosen", "way_out"),
    [
        (["stage1.*", "stage2.*"], r"\(blocks='stage1\.\*' chooses all but its kind\)"),
        ("stage2.*", r"\(no other kind is among them; 'ist' deals out"),
    ],
)
def test_an_error_of_the_first_forward_names_the_blocks_without_those_of_its_kind(chosen, way_out):
    network = Stages()
    FirstForward(select_blocks(network, chosen), network)
    with pytest.raises(BlockSelectionError, match=rf"'stage2\.0' .*Leave it out of `blocks` {way_out}"):
        network(torch.randn(2, WIDTH))

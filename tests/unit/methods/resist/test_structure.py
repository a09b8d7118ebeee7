"""Blocks that are found by structure: several of a class in a container, with an addition in the forward."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from resist_lightning.methods.resist.structure import repeated_blocks, sections
from tests.helpers.hand_written import Encoder, EncoderBlock, ResidualLayer, UNet, WideResNet


class Chain(nn.Module):
    """Two layers, without an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Counts(Chain):
    """Adds to a counter only, as some layers do."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        self.calls += 1
        return super().forward(x)


class JoinsLists(Chain):
    """Adds lists of tensors only, as the trees of DLA do."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        outputs += [super().forward(x)]
        return outputs[-1]


class Adds(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class AddsByFunction(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add(x)


class AddsInHelper(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, super().forward(x))

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        y += x
        return y


class Inherits(Adds):
    """Inherits its parent's forward."""


class Extends(Adds):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class Replaces(Adds):
    """Does not call its parent's addition."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


class Mixin:
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(x)  # type: ignore[attr-defined, no-any-return]


class Mixed(Mixin, Chain):
    """Has the forward of a class that is not a module."""


class Sum(nn.Sequential):
    """A sequence with a sum of its own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Loop(nn.Sequential):
    """A sequence of residual blocks that calls them in its own way."""

    def __init__(self) -> None:
        super().__init__(Adds(), Adds())

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Stage(nn.Module):
    """Many blocks, and a skip around them all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        return x + y


def names(module: nn.Module) -> list[str]:
    return [block.name for block in repeated_blocks(module)]


@pytest.mark.parametrize("kind", [Chain, Counts, JoinsLists, Replaces, lambda: nn.Linear(4, 4), nn.ReLU])
def test_twins_that_add_nothing_are_no_blocks(kind) -> None:
    assert names(nn.Sequential(kind(), kind(), kind())) == []


@pytest.mark.parametrize("kind", [Adds, AddsByFunction, AddsInHelper, ResidualLayer, Inherits, Extends, Mixed, Sum])
def test_twins_that_add_are_blocks(kind) -> None:
    assert names(nn.Sequential(kind(), kind(), kind())) == ["0", "1", "2"]


class Attributes(nn.Module):
    """Blocks as attributes, the first of which changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Adds(), Adds(), Adds()
        self.one.first = nn.Linear(2, 4)


def test_siblings_are_blocks_where_no_container_has_twins() -> None:
    """A stage of two blocks of which the first changes the shape; timm's RegNets, whose blocks are attributes."""
    wider = Adds()
    wider.first = nn.Linear(2, 4)
    assert names(nn.Sequential(wider, Adds())) == ["1"]
    assert names(nn.Sequential(Adds(), Chain())) == []
    assert names(Attributes()) == ["two", "three"]
    assert names(nn.ModuleList([Attributes(), Adds(), Adds()])) == ["1", "2"]


def test_of_a_sequence_that_calls_its_blocks_these_are_found() -> None:
    assert names(nn.Sequential(Loop(), Loop())) == ["0.0", "0.1", "1.0", "1.1"]


def test_blocks_of_two_kinds_that_alternate_are_found_and_a_pair_is_one_child() -> None:
    """MLP-Mixers in a page of code: each layer is a sequence of two different residual wrappers."""
    module = nn.Sequential(nn.Sequential(*(nn.Sequential(Sum(), Sum(8)) for _ in range(3))))
    assert names(module) == [f"0.{layer}.{part}" for layer in range(3) for part in range(2)]
    found = sections(repeated_blocks(module), module)
    assert {name: [block.name for block in blocks] for name, blocks in found.items()} == {
        "0": ["0.1.0", "0.1.1", "0.2.0", "0.2.1"]
    }


def test_of_a_stage_its_blocks_are_found() -> None:
    assert names(nn.Sequential(Stage(), Stage())) == [
        f"{stage}.blocks.{block}" for stage in (0, 1) for block in range(4)
    ]


def test_a_block_that_changes_the_width_is_none() -> None:
    assert names(WideResNet()) == [
        f"groups.{group}.{block}" for group in range(3) for block in range(4) if group == 0 or block
    ]


def test_torch_encoder_layers_are_blocks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)

    assert names(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)) == ["layers.0", "layers.1", "layers.2"]


def test_a_network_with_long_skips_keeps_its_own_forward() -> None:
    assert names(UNet()) == [f"{part}.{block}" for part in ("down", "middle", "up") for block in range(3)]


def test_sections_leave_out_the_first_child_of_each_container() -> None:
    module = Encoder(norm_first=True)
    found = sections(repeated_blocks(module), module)

    assert {name: [block.name for block in blocks] for name, blocks in found.items()} == {
        "blocks": [f"blocks.{number}" for number in (1, 2, 3, 4)]
    }
    assert all(isinstance(block.module, EncoderBlock) for blocks in found.values() for block in blocks)

"""Where branches end: found where scaling the tensors scales each branch, refused where a block only looks residual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation, StochasticDepth

from resist_lightning.methods.resist.branches import find_branch_ends
from tests.helpers.hand_written import WIDTH, DiTBlock, EncoderBlock, WideBlock
from tests.helpers.training import assert_equal_states, clone_state

TOKENS, IMAGE = (3, 5, WIDTH), (3, WIDTH, 6, 6)


class Made(nn.Module):
    """A block of two layers, and how its forward puts them together."""

    def __init__(self, forward: Callable[[Made, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.conv, self.se = nn.Conv2d(WIDTH, WIDTH, 1), SqueezeExcitation(WIDTH, 4)
        self.drop = StochasticDepth(0.5, "row")
        self.put_together = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.put_together(self, x)


ONLY_LOOK_RESIDUAL = {
    "a gate on the skip": (lambda b, x: x * b.g(x).sigmoid() + b.f(x), TOKENS),
    "a highway": (lambda b, x: x * (1 - b.g(x).sigmoid()) + b.f(x) * b.g(x).sigmoid(), TOKENS),
    "a scaled skip": (lambda b, x: 0.9 * x + b.f(x), TOKENS),
    "a doubled skip": (lambda b, x: x + x + b.f(x), TOKENS),
    "a sum without a skip": (lambda b, x: b.f(x) + b.g(x), TOKENS),
    "a layer on the skip": (lambda b, x: b.g(x) + b.f(x.relu()), TOKENS),
    "squeeze and excitation at the end": (lambda b, x: x + b.se(b.conv(x)), IMAGE),
    "squeeze and excitation of the sum": (lambda b, x: b.se(x + b.conv(x)), IMAGE),
    "a smooth activation after the sum": (lambda b, x: functional.gelu(x + b.f(x)), TOKENS),
    "tanh after the sum": (lambda b, x: torch.tanh(x + b.f(x)), TOKENS),
    "an activation at the end of the branch": (lambda b, x: x + functional.gelu(b.f(x)), TOKENS),
    "a layer after the sum": (lambda b, x: b.g(x + b.f(x)), TOKENS),
    "a constant in the sum": (lambda b, x: x + b.f(x) + 0.1, TOKENS),
    "a product": (lambda b, x: x * (1 + b.f(x)) + b.g(x).tanh(), TOKENS),
    "a flipped skip": (lambda b, x: x.flip(1) + b.f(x), TOKENS),
    "no sum": (lambda b, x: b.f(x), TOKENS),
    "nothing": (lambda b, x: x, TOKENS),
}
RESIDUAL = {
    "a layer": (lambda b, x: x + b.f(x), TOKENS, {"f.weight f.bias"}),
    "two layers": (lambda b, x: x + b.g(b.f(x).relu()), TOKENS, {"g.weight g.bias"}),
    "two sums": (lambda b, x: b.g((y := x + b.f(x)).relu()) + y, TOKENS, {"f.weight f.bias", "g.weight g.bias"}),
    "branches side by side": (lambda b, x: x + b.f(x) + b.g(x), TOKENS, {"f.weight f.bias", "g.weight g.bias"}),
    "layer scale": (lambda b, x: x + b.scale * functional.gelu(b.f(x)), TOKENS, {"scale"}),
    "stochastic depth": (lambda b, x: x + b.drop(b.f(x)), TOKENS, {"f.weight f.bias"}),
    "relu after the sum": (lambda b, x: (x + b.f(x)).relu(), TOKENS, {"f.weight f.bias"}),
    "a norm after the sum": (lambda b, x: b.norm(x + b.f(x)), TOKENS, {"f.weight f.bias"}),
    "a norm at the end of the branch": (lambda b, x: x + b.norm(b.f(x)), TOKENS, {"norm.weight norm.bias"}),
    "a difference": (lambda b, x: x - b.f(x), TOKENS, {"f.weight f.bias"}),
}
WHOLE = {
    "pre-norm": (lambda: EncoderBlock(norm_first=True), TOKENS, {"out.weight out.bias", "down.weight down.bias"}),
    "post-norm": (lambda: EncoderBlock(norm_first=False), TOKENS, {"out.weight out.bias", "down.weight down.bias"}),
    "pre-activation": (lambda: WideBlock(WIDTH, WIDTH), IMAGE, {"conv2.weight"}),
}


def ends_of(body: nn.Module, x: Tensor) -> set[str]:
    return {" ".join(end.tensors) for end in find_branch_ends(body, x, body)}


@pytest.mark.parametrize("kind", ONLY_LOOK_RESIDUAL)
def test_a_block_that_only_looks_residual_has_no_ends(kind: str) -> None:
    forward, shape = ONLY_LOOK_RESIDUAL[kind]

    assert ends_of(Made(forward), torch.randn(shape)) == set()


@pytest.mark.parametrize("kind", RESIDUAL)
def test_each_branch_ends_where_its_scale_is(kind: str) -> None:
    forward, shape, expected = RESIDUAL[kind]

    assert ends_of(Made(forward), torch.randn(shape)) == expected


@pytest.mark.parametrize("kind", WHOLE)
def test_blocks_as_people_write_them(kind: str) -> None:
    make, shape, expected = WHOLE[kind]

    assert ends_of(make(), torch.randn(shape)) == expected


def test_a_gate_from_a_condition_is_no_end_of_its_own() -> None:
    block, condition = DiTBlock(), torch.randn(3, WIDTH)

    ends = find_branch_ends(block, torch.randn(TOKENS), lambda x: block(x, condition))

    assert {end.module for end in ends} == {"out", "down"}


def test_a_hint_is_verified_and_not_believed() -> None:
    body, x = Made(RESIDUAL["two layers"][0]), torch.randn(TOKENS)
    right, wrong = find_branch_ends(body, x, body), find_branch_ends(Made(RESIDUAL["a layer"][0]), x, body)

    assert find_branch_ends(body, x, body, hint=right) == right
    assert find_branch_ends(Made(RESIDUAL["layer scale"][0]), x, Made(RESIDUAL["layer scale"][0]), hint=wrong) == ()


def test_the_search_leaves_no_trace() -> None:
    body = EncoderBlock(norm_first=True)
    before, tensors = clone_state(body), [id(tensor) for tensor in body.parameters()]

    ends_of(body, torch.randn(TOKENS))

    assert_equal_states(clone_state(body), before, exactly=True)
    assert [id(tensor) for tensor in body.parameters()] == tensors
    assert not any(child._forward_hooks for child in body.modules())

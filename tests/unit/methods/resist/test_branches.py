"""Branch ends: found if scaling the tensors scales each branch, refused if a block only looks residual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation, StochasticDepth

from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.branches import find_branch_ends
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.folding import fold, folded
from tests.helpers.hand_written import WIDTH, DiTBlock, EncoderBlock, WideBlock
from tests.helpers.training import assert_equal_states, clone_state

TOKENS, IMAGE = (3, 5, WIDTH), (3, WIDTH, 6, 6)


class Made(nn.Module):
    """A block of some layers, and a function that combines them in its forward."""

    def __init__(self, forward: Callable[[Made, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.conv, self.se = nn.Conv2d(WIDTH, WIDTH, 1), SqueezeExcitation(WIDTH, 4)
        self.last = nn.Conv2d(WIDTH, WIDTH, 1)
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
    "a gate by another activation": (lambda b, x: x + b.conv(x).relu() * b.se(b.conv(x)), IMAGE),
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
    "squeeze and excitation at the end": (
        lambda b, x: x + b.drop(b.se(b.conv(x))),
        IMAGE,
        {"conv.weight conv.bias / se.fc1.weight"},
    ),
    "a difference": (lambda b, x: x - b.f(x), TOKENS, {"f.weight f.bias"}),
}
ENTANGLED = {
    "an end inside a later branch": (lambda b, x: (y := x + b.f(x)) + b.g(b.f(y).relu()), TOKENS),
    "a branch that a later one reads": (lambda b, x: x + (y := b.f(x)) + b.g(y.relu()), TOKENS),
    "shift and scale of a branch from one layer": (
        lambda b, x: x + b.f(x).relu() * (1 + (y := b.g(x.flip(1)))) + y.flip(2), TOKENS
    ),
    "a gate that a later branch uses too": (
        lambda b, x: (y := x + b.se(b.conv(x))) + b.last(b.se(y)), IMAGE
    ),
}  # fmt: skip
"""Blocks that are linear in both ends, one after the other, but no scale on both scales the branches."""
WHOLE = {
    "pre-norm": (lambda: EncoderBlock(norm_first=True), TOKENS, {"out.weight out.bias", "down.weight down.bias"}),
    "post-norm": (lambda: EncoderBlock(norm_first=False), TOKENS, {"out.weight out.bias", "down.weight down.bias"}),
    "pre-activation": (lambda: WideBlock(WIDTH, WIDTH), IMAGE, {"conv2.weight"}),
}


def made(forward: Callable[[Made, Tensor], Tensor], x: Tensor, **parts: nn.Module) -> Made:
    """A block with the layers that its forward uses, and no others."""
    body = Made(forward)
    for name, part in parts.items():
        body.add_module(name, part)
    called: set[str] = set()
    handles = [
        child.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, child in body.named_children()
    ]
    body(x)
    for handle in handles:
        handle.remove()
    for name, _ in list(body.named_children()):
        if name not in called:
            delattr(body, name)
    return body


def ends_of(body: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> set[str]:
    return {
        " / ".join(" ".join(names) for names in (end.tensors, end.divided) if names)
        for end in find_branch_ends(body, x, body, dtype=dtype)
    }


@pytest.mark.parametrize("kind", ONLY_LOOK_RESIDUAL)
def test_a_block_that_only_looks_residual_has_no_ends(kind: str) -> None:
    forward, shape = ONLY_LOOK_RESIDUAL[kind]

    x = torch.randn(shape)
    assert ends_of(made(forward, x), x) == set()


@pytest.mark.parametrize("kind", ENTANGLED)
def test_a_branch_that_is_a_part_of_another_one_leaves_no_ends(kind: str) -> None:
    forward, shape = ENTANGLED[kind]

    x = torch.randn(shape)
    assert ends_of(made(forward, x), x) == set()


@pytest.mark.parametrize("kind", RESIDUAL)
def test_each_branch_ends_where_its_scale_is(kind: str) -> None:
    forward, shape, expected = RESIDUAL[kind]

    x = torch.randn(shape)
    assert ends_of(made(forward, x), x) == expected


@pytest.mark.parametrize("kind", WHOLE)
def test_blocks_as_people_write_them(kind: str) -> None:
    make, shape, expected = WHOLE[kind]

    assert ends_of(make(), torch.randn(shape)) == expected


def test_another_default_device_hides_no_branch() -> None:
    """After torch.set_default_device("cuda") torch refused the trial's generator, and hooks scaled all blocks."""
    forward, shape, expected = RESIDUAL["two layers"]
    x = torch.randn(shape)
    body = made(forward, x)
    with torch.device("meta"):
        assert ends_of(body, x) == expected


def test_the_hook_on_a_gated_branch_is_behind_the_gate() -> None:
    x = torch.randn(IMAGE)
    body = made(RESIDUAL["squeeze and excitation at the end"][0], x)

    assert [end.module for end in find_branch_ends(body, x, body)] == ["se"]


def test_a_gate_from_a_condition_is_no_end_of_its_own() -> None:
    block, condition = DiTBlock(), torch.randn(3, WIDTH)

    ends = find_branch_ends(block, torch.randn(TOKENS), lambda x: block(x, condition))

    assert {end.module for end in ends} == {"out", "down"}


def test_a_hint_is_verified_and_not_believed() -> None:
    x = torch.randn(TOKENS)
    body, other, simple = (made(RESIDUAL[kind][0], x) for kind in ("two layers", "layer scale", "a layer"))
    right, wrong = find_branch_ends(body, x, body), find_branch_ends(simple, x, simple)

    assert find_branch_ends(body, x, body, hint=right) == right
    assert find_branch_ends(other, x, other, hint=wrong) == find_branch_ends(other, x, other) != wrong


class StateSpace(nn.Module):
    """A mixer whose own parameter is used before its last layer, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Parameter(torch.ones(WIDTH))
        self.enter, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        return self.out(functional.silu(y) + self.skip * y)


def test_a_part_of_a_branch_is_no_branch_of_its_own() -> None:
    """In Mamba, D and the output projection were both scaled: D is applied first, but its module returns last."""
    body = made(lambda b, x: x + b.mixer(b.norm(x)), torch.randn(TOKENS), mixer=StateSpace())

    assert ends_of(body, torch.randn(TOKENS)) == {"mixer.out.weight"}


class Two(nn.Module):
    """Two branches in sequence, with optional stochastic depth; ``expected`` is the scaled block by hand."""

    def __init__(self, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = drop or nn.Identity()
        self.losses: list[Tensor] = []
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.first(x))
        self.losses.append(x.mean())
        self.seen += 1
        return x + self.drop(self.second(self.norm(x)))

    def expected(self, x: Tensor, scale: float) -> Tensor:
        x = x + scale * self.first(x)
        return x + scale * self.second(self.norm(x))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("samples", [1, 2, 8])
def test_stochastic_depth_hides_no_branch(samples: int, rate: float, mode: str) -> None:
    block = block_at("block", Two(StochasticDepth(rate, mode)))
    look = FirstForward([block])
    x = torch.randn(samples, 5, WIDTH)
    block.module(x)
    look.remove()
    block.module.eval()
    expected = block.module.expected(x, 0.3)
    fold(folded([block]), 0.3)

    torch.testing.assert_close(block.module(x), expected)


def test_the_search_writes_nothing_into_what_the_block_keeps() -> None:
    block = block_at("block", Two())
    look = FirstForward([block])
    block.module(torch.randn(TOKENS))
    look.remove()

    assert len(block.module.losses) == 1
    assert block.module.seen == 1


class Experts(nn.Module):
    """Sends every token to one of its experts, or leaves out its second branch without a condition."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        self.cross = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        chosen, added = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                added = added + expert(x) * (chosen == number).unsqueeze(-1)
        x = x + added
        return x if condition is None else x + self.cross(condition)


@pytest.mark.parametrize(
    ("count", "tokens", "condition", "found"), [(2, 64, True, 3), (16, 2, True, 0), (2, 64, False, 0)]
)
def test_a_branch_that_does_not_run_leaves_no_ends(count: int, tokens: int, condition: bool, found: int) -> None:
    block, x = block_at("block", Experts(count)), torch.randn(3, tokens, WIDTH)
    look = FirstForward([block])
    block.module(x, torch.randn_like(x) if condition else None)
    look.remove()

    assert len(block.seen.ends or ()) == found
    assert found or block.seen.why.endswith("was not used")


class Bent(nn.Module):
    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.out, self.bend = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), bend

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bend(self.out(self.norm(x)))


@pytest.mark.parametrize("bend", [lambda f: f.clamp(-10, 10), lambda f: 50 * torch.tanh(f / 50)])
def test_a_branch_that_is_bent_far_from_zero_has_no_ends(bend: Callable[[Tensor], Tensor]) -> None:
    assert ends_of(Bent(bend), torch.randn(TOKENS)) == set()


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_before_a_norm_without_weights_is_no_end(training: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.conv(x))

    assert ends_of(Normed().train(training), torch.randn(IMAGE)) == set()


def test_the_search_leaves_no_trace() -> None:
    body = EncoderBlock(norm_first=True)
    before, tensors = clone_state(body), [id(tensor) for tensor in body.parameters()]

    ends_of(body, torch.randn(TOKENS))

    assert_equal_states(clone_state(body), before, exactly=True)
    assert [id(tensor) for tensor in body.parameters()] == tensors
    assert not any(child._forward_hooks for child in body.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*RESIDUAL, *ONLY_LOOK_RESIDUAL, *ENTANGLED])
def test_sixteen_bits_tell_the_same(kind: str, dtype: torch.dtype) -> None:
    forward, shape, *expected = {**RESIDUAL, **ONLY_LOOK_RESIDUAL, **ENTANGLED}[kind]
    x = torch.randn(shape)

    found = ends_of(made(forward, x), x, dtype)

    # The small effect of a gate is lost in rounding, so a block that ends in one gets hooks.
    gated = any(" / " in end for ends in expected for end in ends)
    assert found == (set() if gated or not expected else expected[0])


class Kernel(EncoderBlock):
    """A block without a kernel for single precision, like some attention on GPUs."""

    def attend(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise RuntimeError(f"no kernel for {x.dtype}")
        return super().attend(x)


def test_a_block_with_kernels_for_16_bits_only_is_seen_in_16_bits() -> None:
    block, x = block_at("block", Kernel(norm_first=True).bfloat16()), torch.randn(TOKENS).bfloat16()
    look = FirstForward([block])
    block.module(x)
    look.remove()

    assert {end.module for end in block.seen.ends or ()} == {"out", "down"}

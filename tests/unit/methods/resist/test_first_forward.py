"""Findings of a block's first forward: whether leaving out its residual branch makes it the identity."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.folding import fold, folded
from resist_lightning.methods.resist.subnet import SubnetBlock
from tests.helpers.nets import Undeclared
from tests.helpers.residual import TOKENS, WIDTH, Add, Gate, Mixer, Odd, Scaled, Wrapper, compiled_blocks_move
from tests.helpers.training import assert_equal_states, clone_state


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))


TOKEN_INPUT, IMAGE = (2, TOKENS, WIDTH), (2, WIDTH, 6, 6)

RESIDUAL = {
    "an MLP with a skip": (lambda: Add(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))), TOKEN_INPUT),
    "in place": (lambda: Add(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))), TOKEN_INPUT),
    "an activation behind the sum": (lambda: Add(convolutions(), act=functional.relu), IMAGE),
    "a norm behind the sum": (lambda: Add(nn.Linear(WIDTH, WIDTH), norm=nn.LayerNorm(WIDTH)), TOKEN_INPUT),
    "a batch norm and an activation behind the sum": (
        lambda: Add(convolutions(), nn.BatchNorm2d(WIDTH), functional.gelu),
        IMAGE,
    ),
    "a mixer": (Mixer, TOKEN_INPUT),
    "gates": (Scaled, TOKEN_INPUT),
    "an LSTM": (lambda: Add(nn.LSTM(WIDTH, WIDTH, batch_first=True)), TOKEN_INPUT),
    "weight norm": (lambda: Add(weight_norm(nn.Linear(WIDTH, WIDTH))), TOKEN_INPUT),
    "parametrized weight norm": (lambda: Add(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))), TOKEN_INPUT),
    "spectral norm": (lambda: Add(spectral_norm(nn.Linear(WIDTH, WIDTH))), TOKEN_INPUT),
    "torch's encoder layer": (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), TOKEN_INPUT),
}
OTHERS = {
    "an MLP": (lambda: wrapped(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))), TOKEN_INPUT),
    "convolutions": (lambda: wrapped(nn.Sequential(convolutions(), nn.ReLU())), IMAGE),
    "a batch norm": (lambda: wrapped(nn.BatchNorm2d(WIDTH)), IMAGE),
    "a gate": (lambda: wrapped(Gate()), TOKEN_INPUT),
}


def wrapped(inside: nn.Module) -> nn.Module:
    return Wrapper(inside)


def everything_of(module: nn.Module) -> list[Any]:
    """A module's tensors, by identity and bits, its hooks and attributes."""
    found: list[Any] = []
    for child in module.modules():
        found.append({key: value for key, value in vars(child).items() if not isinstance(value, Tensor)})
        found[-1] = {key: dict(value) if isinstance(value, dict) else value for key, value in found[-1].items()}
    return [*found, [(id(t), t.clone(), t._version) for t in module.state_dict(keep_vars=True).values()]]


@pytest.mark.parametrize("kind", RESIDUAL)
def test_a_residual_block_is_one_whatever_its_branch_is(kind):
    make, shape = RESIDUAL[kind]
    torch.manual_seed(0)
    block = make()
    x = torch.randn(shape)
    look = FirstForward([block_at("block", block)])
    block(x)
    assert not block._forward_hooks
    assert not block._forward_pre_hooks or "norm" in kind
    look.remove()


@pytest.mark.parametrize("kind", OTHERS)
def test_what_adds_nothing_to_its_input_is_refused_by_name(kind):
    make, shape = OTHERS[kind]
    block = make()
    FirstForward([block_at("stage.3", block)])
    with pytest.raises(BlockSelectionError, match=r"'stage\.3' \(Wrapper\) is not residual"):
        block(torch.randn(shape))


def test_a_declaration_is_taken_at_its_word():
    class Declared(Gate):
        residual_branch_end = "inside"

    block = Declared()
    FirstForward([block_at("block", block)])
    assert block(torch.randn(TOKEN_INPUT)).shape == TOKEN_INPUT


class Shortcut(nn.Module):
    """Adds a shortcut that its caller passes, as the blocks of DLA."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return (self.inside(x.relu()) + (x if shortcut is None else shortcut)).relu()


def test_a_block_that_is_given_its_input_twice_is_residual_and_with_another_shortcut_it_is_not():
    blocks = [block_at(f"layer.{index}", Shortcut()) for index in range(3)]
    FirstForward(blocks)
    x = torch.randn(3, TOKENS, WIDTH)
    blocks[0].module(x, x)
    blocks[1].module(x=x, shortcut=x)
    for block in blocks[:2]:
        assert set(folded([block])) == {f"{block.name}.inside.weight", f"{block.name}.inside.bias"}
    with pytest.raises(BlockSelectionError, match="is not residual"):
        blocks[2].module(x, 2 * x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += self.inside(x.relu())
        return x


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_block_that_overwrites_its_input_is_scaled_in_its_last_layer_or_refused(mode):
    class Bent(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            x += self.inside(x.relu()).tanh()
            return x

    linear, bent = block_at("layer.0", InPlace()), block_at("layer.0", Bent())
    FirstForward([linear, bent])
    x = torch.randn(TOKEN_INPUT)
    with mode():
        linear.module(x.clone())
        assert set(folded([linear])) == {"layer.0.inside.weight", "layer.0.inside.bias"}
        with pytest.raises(BlockSelectionError, match=r"block 'layer\.0' \(Bent\) writes into its input"):
            bent.module(x)


def test_a_block_that_overwrites_its_input_is_scaled_in_the_layer_that_it_declares():
    class Declared(InPlace):
        residual_branch_end = "inside"

    block = block_at("block", Declared())
    x = torch.randn(TOKEN_INPUT)
    branch = block.module.inside(x.relu())
    FirstForward([block])
    assert torch.equal(block.module(x.clone()), x + branch)
    fold(folded([block]), 0.5)
    assert torch.allclose(block.module(x.clone()), x + 0.5 * branch)


@pytest.fixture
def packing():
    """Torch's encoder packs padded sequences; a test of an export or of another library may have switched it off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("packing")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_sequences_that_an_encoder_packs_in_evaluation_wait_for_the_next_call():
    """The Trainer's validation before the training ended with torch's "NestedTensorImpl doesn't support sizes"."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    block = block_at("layers.1", encoder.layers[1])
    x, padding = torch.randn(3, TOKENS, WIDTH), torch.zeros(3, TOKENS, dtype=torch.bool)
    padding[1, 2:] = True
    with torch.no_grad():
        expected = encoder.eval()(x, src_key_padding_mask=padding)
        look = FirstForward([block])
        assert torch.allclose(encoder(x, src_key_padding_mask=padding), expected, atol=1e-5)
    assert block.seen.ends is None
    encoder.train()(x, src_key_padding_mask=padding)
    look.remove()
    assert {end.module for end in block.seen.ends or ()} == {"linear2", "self_attn"}


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("odd", ["returns a tuple", "data type", "shape", "a list"])
def test_what_cannot_be_left_out_is_refused_where_it_is_present_and_where_it_is_absent(odd, absent):
    block = block_at("layer.0", Odd(odd))
    FirstForward([block])
    if absent:
        SubnetBlock(block).free()
    x = torch.randn(TOKEN_INPUT)
    with pytest.raises(BlockSelectionError, match=rf"block 'layer\.0' .*{odd}"):
        block.module([x] if odd == "a list" else x)


def test_looking_changes_nothing_and_nobody_notices():
    class Counts(Undeclared):
        def __init__(self) -> None:
            super().__init__(WIDTH)
            self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.last: Any = None

        def forward(self, x: Tensor, state: list[int] | None = None) -> Tensor:
            self.mean = 0.9 * self.mean + x.detach().mean(0)
            self.last = x
            if state is not None:
                state.append(random.randint(0, 9))
            return super().forward(self.drop(self.norm(x)))

    looked, plain = Counts(), Counts()
    plain.load_state_dict(looked.state_dict())
    seen: list[list[str]] = [[], []]
    for notes, net in zip(seen, (looked, plain), strict=True):
        net.inside.register_forward_hook(lambda *_, notes=notes: notes.append("after"))
        net.inside.register_forward_pre_hook(lambda *_, notes=notes: notes.append("before"))
    x, outputs = torch.randn(6, WIDTH), []
    look = FirstForward([block_at("block", looked)])
    for net in (looked, plain):
        torch.manual_seed(1)
        random.seed(1)
        state: list[int] = []
        output = net(x.clone().requires_grad_(), state)
        output.sum().backward()
        outputs.append((output, state, torch.get_rng_state()))
    look.remove()
    (output, state, rng), (expected, expected_state, expected_rng) = outputs
    assert torch.equal(output, expected)
    assert (state, seen[0]) == (expected_state, seen[1])
    assert torch.equal(rng, expected_rng)
    assert_equal_states(clone_state(looked), clone_state(plain))
    assert torch.equal(looked.inside.weight.grad, plain.inside.weight.grad)
    assert vars(looked).keys() == vars(plain).keys()
    assert not looked._forward_hooks


def test_a_compiled_block_is_looked_at_before_it_runs_compiled():
    block = wrapped(nn.Linear(WIDTH, WIDTH))
    block.compile(backend="eager")
    compiled = block._compiled_call_impl
    look = FirstForward([block_at("block", block)])
    with pytest.raises(BlockSelectionError, match="not residual"):
        block(torch.randn(TOKEN_INPUT))
    look.remove()
    assert block._compiled_call_impl is compiled


def test_a_block_in_code_that_is_compiled_around_it_is_refused_when_it_is_met():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Undeclared(WIDTH))
    block, x = block_at("1", net[1]), torch.randn(2, WIDTH)
    around = torch.compile(net, backend="eager")
    FirstForward([block])
    with pytest.raises(BlockSelectionError, match=r"block '1' lies in code, which torch\.compile.*block\.compile\(\)"):
        around(x)


@compiled_blocks_move
def test_a_block_that_is_absent_in_code_that_is_compiled_around_it_is_refused():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Undeclared(WIDTH))
    block, x = block_at("1", net[1]), torch.randn(2, WIDTH)
    around = torch.compile(net, backend="eager")
    FirstForward([block])
    net(x)  # a first forward alone, and compiled later
    assert torch.equal(around(x), net(x))
    SubnetBlock(block).free()
    with pytest.raises(BlockSelectionError, match="block '1' lies in code"):
        around(x)


def test_what_is_compiled_inside_of_a_block_is_not_compiled_for_the_look():
    block = Undeclared(WIDTH)
    graphs = []

    @torch._dynamo.register_backend(name="noting")
    def note(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    block.inside = torch.compile(block.inside, backend="noting")
    FirstForward([block_at("block", block)])
    for _ in range(2):
        block(torch.randn(2, WIDTH, requires_grad=True))
    assert len(graphs) == 1


def test_a_compiled_block_that_is_absent_in_its_first_forward_runs_compiled_when_it_is_present():
    block = Undeclared(WIDTH)
    block.compile(backend="eager")
    known = block_at("block", block)
    code = block._compiled_call_impl
    subnet = SubnetBlock(known)
    look = FirstForward([known])
    subnet.free()
    x = torch.randn(2, WIDTH)
    assert torch.equal(block(x), x)
    assert block._compiled_call_impl is None
    look.remove()
    assert block._compiled_call_impl is None
    subnet.allocate()
    assert block._compiled_call_impl is code

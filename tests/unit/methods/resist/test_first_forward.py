"""What a block's first forward tells: whether leaving it out is the identity, up to its residual branch."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from resist_lightning import Config, Engine
from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.network import left_out, select_blocks
from resist_lightning.methods.resist.scaling import fold
from resist_lightning.methods.resist.simulator import Simulator
from resist_lightning.methods.resist.subnet import SubnetBlock
from tests.helpers.nets import MlpBlock, Undeclared, mlp
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state

WIDTH, TOKENS = 8, 5


class Add(nn.Module):
    """Adds a branch to its input."""

    def __init__(self, branch: nn.Module, norm: nn.Module | None = None, act: Any = None) -> None:
        super().__init__()
        self.branch, self.norm, self.act = branch, norm, act

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        y = x + (out[0] if isinstance(out, tuple) else out)
        y = self.norm(y) if self.norm is not None else y
        return self.act(y) if self.act is not None else y


class Mixer(nn.Module):
    """Mixes tokens, then channels: its first layer reads tokens, its last one makes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 7), nn.GELU(), nn.Linear(7, TOKENS))
        self.channels = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


class DiT(nn.Module):
    """Its norms get shift, scale and gate from a condition, by a layer that is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).unsqueeze(1).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Scaled(nn.Module):
    """Layer scale, a gate, and a buffer on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gate, self.scale = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Parameter(torch.ones(1)),
        )
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one + self.scale * self.inside(x) * self.gate(x).sigmoid()


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


class Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Any:
        return self.inside(x)


def wrapped(inside: nn.Module) -> nn.Module:
    return Wrapper(inside)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inside(x).sigmoid()


def everything_of(module: nn.Module) -> list[Any]:
    """Tensors by identity and bits, hooks and attributes."""
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


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += self.inside(x.relu())
        return x


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("absent", [False, True])
def test_a_block_that_overwrites_its_input_is_refused_as_a_hook_could_not_scale_it(absent, mode):
    block = block_at("layer.0", InPlace())
    FirstForward([block])
    if absent:
        SubnetBlock(block).free()
    with mode(), pytest.raises(BlockSelectionError, match=r"block 'layer\.0' \(InPlace\) writes into its input"):
        block.module(torch.randn(TOKEN_INPUT))


def test_a_block_that_overwrites_its_input_is_scaled_in_the_layer_that_it_declares():
    class Declared(InPlace):
        residual_branch_end = "inside"

    block = block_at("block", Declared())
    x = torch.randn(TOKEN_INPUT)
    branch = block.module.inside(x.relu())
    FirstForward([block])
    assert torch.equal(block.module(x.clone()), x + branch)
    fold([block], 0.5)
    assert torch.allclose(block.module(x.clone()), x + 0.5 * branch)


class Odd(nn.Module):
    """Residual, but for what it returns."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.inside, self.odd = nn.Linear(WIDTH, WIDTH), odd

    def forward(self, x: Any, mask: Tensor | None = None) -> Any:
        if self.odd == "a list":
            return x[0] + self.inside(x[0])
        y = x + self.inside(x)
        made = {"returns a tuple": lambda: (y, None), "data type": y.double, "shape": lambda: y[:, ::2]}
        return made.get(self.odd, lambda: y)()


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


@pytest.mark.parametrize(
    "call", [lambda b, x, m: b(x, m), lambda b, x, m: b(mask=m, x=x), lambda b, x, m: b(x, mask=m)]
)
def test_an_absent_block_gives_back_its_input_however_it_is_called(call):
    block = block_at("layer.0", Odd(""))
    FirstForward([block])
    SubnetBlock(block).free()
    x = torch.randn(TOKEN_INPUT)
    assert call(block.module, x, torch.ones(1)) is x
    assert call(block.module, x, torch.ones(1)) is x
    with pytest.raises(
        BlockSelectionError, match=r"'layer\.0' is called with torch\.int64 as its first argument \(x\)"
    ):
        call(block.module, torch.ones(2, dtype=torch.long), None)


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


class Calls(nn.Module):
    """Blocks that are called by position or by keyword, some with a condition."""

    def __init__(self, kind: type[nn.Module], how: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks, self.how = nn.ModuleList(kind() for _ in range(4)), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        condition = (x.mean(1),) if isinstance(self.blocks[0], DiT) else ()
        for block in self.blocks:
            if self.how == "keyword":
                x = block(**({"condition": condition[0]} if condition else {}), x=x)
            else:
                x = block(x, *condition)
        return self.head(x).mean(1)


CONFIG = Config(local_steps=2, blocks="blocks.*", min_blocks=1)


def batch(worker: int, step: int) -> Tensor:
    return torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(10 * worker + step))


def train(collective: Any, template: nn.Module) -> dict[str, Tensor]:
    net = copy.deepcopy(template)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = Engine(net, [optimizer], CONFIG, collective=collective)
    engine.start()
    for step in range(5):
        optimizer.zero_grad()
        net(batch(collective.worker, step)).square().mean().backward()
        optimizer.step()
        engine.after_step()
    engine.finish()
    return clone_state(net)


@pytest.mark.parametrize("kind", [Mixer, DiT, Scaled])
def test_blocks_called_by_keyword_train_like_those_called_by_position_and_like_the_simulator(kind):
    net = Calls(kind, "keyword")
    by_position = copy.deepcopy(net)
    by_position.how = "position"
    (keyword, other), _ = run_threads(train, 2, net)
    (position, _), _ = run_threads(train, 2, by_position)
    assert_equal_states(keyword, other, exactly=True)
    assert_equal_states(keyword, position, exactly=True)
    simulator = Simulator(net, lambda m: torch.optim.SGD(m.parameters(), 0.1), CONFIG, 2)
    for step in range(5):
        for index, worker in enumerate(simulator.workers):
            worker.optimizers[0].zero_grad()
            worker.module(batch(index, step)).square().mean().backward()
            worker.optimizers[0].step()
        simulator.after_step()
    for name, tensor in simulator.full_model().state_dict().items():
        assert torch.allclose(keyword[name], tensor, atol=1e-6), name


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool1d(x + self.inside(x), 2)


@pytest.mark.parametrize("kind", [Pools, lambda: Odd("returns a tuple"), Gate])
def test_every_worker_refuses_in_its_first_step_before_a_wrong_number_is_out(kind):
    refused: list[str] = []
    net = Calls(kind, "position")

    def work(collective: Any) -> None:
        with pytest.raises(BlockSelectionError, match=r"'blocks\.\d'") as caught:
            train(collective, net)
        refused.append(str(caught.value))

    run_threads(work, 2)
    assert len(refused) == 2


def test_one_worker_trains_any_block():
    (state,), _ = run_threads(train, 1, Calls(Gate, "position"))
    assert state


class Teaches(nn.Module):
    def __init__(self, teacher_first: bool, **frozen: bool) -> None:
        super().__init__()
        names = ("teacher", "student") if teacher_first else ("student", "teacher")
        for name in names:
            setattr(self, name, mlp(MlpBlock))
            getattr(self, name).body.requires_grad_(not frozen.get(name, False))
            if frozen.get(name, False):
                getattr(self, name).requires_grad_(False)


@pytest.mark.parametrize("first", [True, False])
def test_of_several_networks_only_those_that_train_are_dealt_out(first):
    net = Teaches(first, teacher=True)
    assert {block.network for block in select_blocks(net, "body.*")} == {"student"}
    assert left_out(net, "body.*") == tuple(f"teacher.body.{i}" for i in range(4))
    with_gradients = Teaches(first)
    optimized = {id(p) for p in with_gradients.student.parameters()}
    assert {block.network for block in select_blocks(with_gradients, "body.*", optimized)} == {"student"}
    assert {block.network for block in select_blocks(with_gradients, "body.*")} == {"student", "teacher"}
    assert len(select_blocks(Teaches(first, student=True, teacher=True), "student.body.*")) == 4

"""Unusual tensors, and tensors that replace others while a module trains."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from resist_lightning import Config, Engine, NeuronConfig
from resist_lightning.comm.tensors import KnownTensors, check_tensors, same
from tests.helpers.ist import ONE_AT_A_TIME
from tests.helpers.threads import run_threads


class Net(nn.Module):
    """Residual blocks, neurons, and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 3)
        self.body = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("shared_by_all", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x - self.mean).relu()
        for block in self.body:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(8, 6), nn.Linear(6, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outside(self.inside(x).relu())


def batch(worker: int, step: int) -> Tensor:
    return worker + torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * worker + step))


def train(collective: Any, template: nn.Module, config: Any, steps: int) -> tuple[nn.Module, Any]:
    """Train; the loop assigns the buffers, since a forward that does so cannot be traced for IST."""
    net = copy.deepcopy(template)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with ONE_AT_A_TIME:
        engine = Engine(net, [optimizer], config, collective=collective)
    engine.start()
    for step in range(steps):
        net.mean = 0.5 * net.mean + 0.5 * batch(collective.worker, step).mean(0)
        for block in net.body:
            if not block.seen.is_meta:
                block.seen = block.seen + 1
        optimizer.zero_grad()
        net(batch(collective.worker, step)).square().mean().backward()
        optimizer.step()
        engine.after_step()
    engine.finish()
    return net, engine


CONFIGS = {
    "local_sgd": Config(blocks=[], local_steps=2, check="full"),
    "resist": Config(blocks="body.*", min_blocks=1, local_steps=2, check="full"),
    "ist": NeuronConfig(layers="*inside", local_steps=2, check="full"),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.filterwarnings("ignore:.*does not fold")
def test_a_buffer_that_is_assigned_anew_is_averaged(method, steps):
    """Every round begins with the mean over the workers, computed here without a network."""
    nets, _ = run_threads(train, 2, Net(), CONFIGS[method], steps)
    means = [torch.zeros(3), torch.zeros(3)]
    for step in range(steps):
        means = [0.5 * mean + 0.5 * batch(worker, step).mean(0) for worker, mean in enumerate(means)]
        if step % 2 or step == steps - 1:
            means = [(means[0] + means[1]) / 2] * 2
    for net, engine in nets:
        torch.testing.assert_close(net.mean, means[0])
        assert [int(block.seen) for block in net.body] == [steps] * 3
        assert engine.layout.shared["mean"] is net.mean
        for name, tensor in net.state_dict().items():
            assert same(tensor, nets[0][0].state_dict()[name]), name


def assign_all(net: nn.Module) -> None:
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)


def new_weight(net: nn.Module) -> None:
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())


def longer(net: nn.Module) -> None:
    net.mean = torch.zeros(4)


def another(net: nn.Module) -> None:
    net.late = nn.Linear(2, 2)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (new_weight, r"parameter head\.weight is not the object .*assign=True.*Write into the existing parameter"),
        (lambda net: delattr(net, "head"), r"parameter head\.weight is gone from the module"),
        (another, r"parameter late\.weight was added after the training began.*__init__"),
        (longer, r"buffer mean was \(3,\) torch\.float32 .* is \(4,\) torch\.float32 now.*persistent=False"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not fold")
def test_what_takes_the_place_of_a_known_tensor_is_refused_by_name(method, change, message):
    """Replaced between the batches of a round, so that the next handshake finds it."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = Engine(net, [optimizer], CONFIGS[method])
    engine.start()
    change(net)
    engine.after_step()
    with pytest.raises(RuntimeError, match=message):
        engine.after_step()


@pytest.mark.filterwarnings("ignore:.*does not fold")
def test_parameters_that_are_assigned_as_a_whole_are_refused():
    net = Net()
    engine = Engine(net, [], CONFIGS["local_sgd"])
    assign_all(net)
    with pytest.raises(RuntimeError, match=r"parameter stem\.weight is not the object"):
        engine.start()


def test_caches_masks_and_other_names_are_left_alone():
    net = Net()
    net.register_buffer("cache", torch.zeros(2), persistent=False)
    known = KnownTensors(net)
    known.keep()
    net.cache = torch.ones(5)
    net.register_buffer("another_cache", torch.zeros(2), persistent=False)
    known.keep()
    assert net.cache.tolist() == [1.0] * 5
    prune.random_unstructured(net.head, "weight", 0.5)
    with pytest.warns(UserWarning, match=r"head\.weight_mask was added .* differs between workers"):
        known.keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.keep()


class Attends(nn.Module):
    """Averages earlier tokens, by a mask of -inf that it keeps as a new buffer, as one that grows, or not at all."""

    def __init__(self, cache: str) -> None:
        super().__init__()
        self.inside, self.kept = nn.Linear(8, 8), cache != "none"
        if cache == "grows":
            self.register_buffer("mask", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = getattr(self, "mask", None)
        if mask is None or len(mask) < x.shape[1]:
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
            if self.kept:
                self.register_buffer("mask", mask, persistent=False)
        return x + mask[: x.shape[1], : x.shape[1]].softmax(-1) @ self.inside(x)


def sequences(worker: int, step: int) -> Tensor:
    shape = 4, 3 + 2 * worker + step % 2, 3
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * worker + step))


def train_on_sequences(collective: Any, template: nn.Module, config: Config) -> tuple[dict[str, Tensor], set[str]]:
    """Train, and say which tensors the worker's own file of a checkpoint would have in the last, incomplete round."""
    net = copy.deepcopy(template)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine = Engine(net, [optimizer], config, collective=collective)
    engine.start()
    for step in range(7):
        optimizer.zero_grad()
        net(sequences(collective.worker, step)).square().mean().backward()
        optimizer.step()
        engine.after_step()
    saved = set(engine.resumption.state_dict()["tensors"])
    engine.finish()
    return {name: tensor.detach().clone() for name, tensor in net.named_parameters()}, saved


@pytest.mark.parametrize("cache", ["new", "grows"])
@pytest.mark.parametrize("held", [0, 1, 3])
def test_caches_that_forwards_make_are_each_workers_own(cache: str, held: int) -> None:
    """Workers with sequences of unequal lengths ended with `WorkersDisagree`, or with an error about NaN."""
    plain = Net()
    plain.body = nn.ModuleList(Attends("none") for _ in range(3))
    caching = copy.deepcopy(plain)
    caching.body = nn.ModuleList(Attends(cache) for _ in range(3))
    caching.body.load_state_dict(plain.body.state_dict())
    config = Config(blocks="body.*" if held else [], min_blocks=held, local_steps=2, check="full")
    expected, _ = run_threads(train_on_sequences, 2, plain, config)
    trained, _ = run_threads(train_on_sequences, 2, caching, config)
    for (state, saved), (wanted, _) in zip(trained, expected, strict=True):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        assert not any(name.endswith("mask") for name in saved)


def test_a_buffer_keeps_its_object_and_takes_the_value():
    net = Net()
    known, mean = KnownTensors(net), net.mean
    net.mean = (net.stem.weight.sum() * torch.ones(3)).double().float()
    value, version = net.mean.detach().clone(), mean._version
    known.keep()
    assert net.mean is mean
    assert torch.equal(mean, value)
    assert mean._version > version
    assert not mean.requires_grad


def test_tensors_with_one_memory_for_several_entries_get_memory_of_their_own():
    net = Net()
    buffer = net.shared_by_all
    known = KnownTensors(net)
    known.keep()
    assert net.shared_by_all is buffer
    buffer.copy_(torch.arange(4.0))
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_averaged_are_refused_by_name_before_any_work(tensor, kind):
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_buffer("table", tensor())
    with pytest.raises(ValueError, match=rf"0\.table is a {kind} tensor.*plain attribute"):
        Engine(net, [], Config(blocks=[]))
    check_tensors(nn.LazyLinear(2))

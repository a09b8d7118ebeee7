"""A network that is cut as found computes the same as the whole one with the other neurons masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.network.discovery import find_neurons
from resist_lightning.methods.ist.network.neurons import Cut, HiddenLayer
from tests.helpers.cutting import cut, masked

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)
MIXING = (nn.GroupNorm, nn.LayerNorm)  # their statistics are over all neurons


class Call(nn.Module):
    """A module that applies a function to its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass
class Built:
    """A random network, and the expected findings, recorded while it was built."""

    net: nn.Module
    inputs: Tensor
    weighted: list[nn.Module] = field(default_factory=list)
    followers: dict[nn.Module, nn.Module] = field(default_factory=dict)  # norm or PReLU, and the layer it follows
    repeats: dict[nn.Module, int] = field(default_factory=dict)
    normed: set[nn.Module] = field(default_factory=set)  # layers directly followed by a norm


activations = st.sampled_from(
    [
        nn.ReLU,
        nn.Tanh,
        nn.GELU,
        nn.LeakyReLU,
        nn.Sigmoid,
        nn.PReLU,
        lambda: Call(functional.relu),
        lambda: Call(torch.tanh),
        lambda: Call(lambda x: x.sigmoid() * x),
        lambda: Call(lambda x: (x * 2 + 1).clamp(-3, 3)),
        lambda: Call(lambda x: -x.relu_()),
    ]
)
silent = st.lists(
    st.sampled_from([nn.Identity, nn.Dropout, lambda: Call(lambda x: functional.dropout(x, 0.3, training=False))]),
    max_size=2,
)
flattenings = st.sampled_from(
    [
        nn.Flatten,
        lambda: Call(lambda x: x.flatten(1)),
        lambda: Call(lambda x: torch.flatten(x, start_dim=1)),
        lambda: Call(lambda x: x.view(x.size(0), -1)),
        lambda: Call(lambda x: torch.reshape(x, (x.shape[0], -1))),
        lambda: Call(lambda x: x.flatten(2).flatten(1)),
    ]
)


def pools(rank: int) -> st.SearchStrategy[tuple[Callable[[], nn.Module], int]]:
    """An operation that changes only positions, and the side that it makes of 4."""
    module = {name: getattr(nn, f"{name}{rank}d") for name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "ConstantPad")}
    function = getattr(functional, f"max_pool{rank}d")
    return st.sampled_from(
        [
            (nn.Identity, 4),
            (lambda: module["MaxPool"](2), 2),
            (lambda: module["AvgPool"](2), 2),
            (lambda: module["AdaptiveAvgPool"](3), 3),
            (lambda: module["ConstantPad"](1, 0.5), 6),
            (lambda: Call(lambda x: function(x, 2)), 2),
            (lambda: Call(lambda x: functional.interpolate(functional.instance_norm(x), scale_factor=2.0)), 8),
            (lambda: Call(lambda x: functional.pad(x, (1, 1) * rank)), 6),
        ]
    )


def norms(width: int, rank: int) -> st.SearchStrategy[Callable[[], nn.Module] | None]:
    affine = {"affine": True, "track_running_stats": True}
    if rank == 0:
        return st.sampled_from([None, lambda: nn.BatchNorm1d(width), lambda: nn.LayerNorm(width)])
    batch, instance = getattr(nn, f"BatchNorm{rank}d"), getattr(nn, f"InstanceNorm{rank}d")
    return st.sampled_from(
        [None, lambda: batch(width), lambda: instance(width, **affine), lambda: nn.GroupNorm(1, width)]
    )


@st.composite
def networks(draw: st.DrawFn, with_mixing: bool) -> Built:
    """Convolutions (perhaps none), flattened, then linear layers; nested at random."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    parts: list[nn.Module] = []
    rank = draw(st.integers(0, 2))
    inputs = draw(st.integers(1, 3))
    side, repeat = 4, 1
    built = Built(nn.Identity(), torch.randn(3, inputs, *[side] * rank, dtype=torch.double))

    def add(layer: nn.Module, width: int, rank: int, last: bool) -> None:
        built.weighted.append(layer)
        parts.append(layer)
        parts.extend(make() for make in draw(silent))
        make_norm = draw(norms(width, rank))
        if make_norm is not None and (with_mixing or not isinstance(make_norm(), MIXING)):
            parts.append(make_norm())
            built.normed.add(layer)
            if not last:
                built.followers[parts[-1]] = layer
        if not last:
            parts.append(draw(activations)())
            if isinstance(parts[-1], nn.PReLU) and draw(st.booleans()):
                parts[-1] = nn.PReLU(width)
                built.followers[parts[-1]] = layer
            parts.extend(make() for make in draw(silent))

    if rank:
        for _ in range(draw(st.integers(1, 3))):
            width = draw(st.integers(2, 4))
            bias = draw(st.booleans())
            add(getattr(nn, f"Conv{rank}d")(inputs, width, 3, padding=1, bias=bias), width, rank, False)
            parts.append(getattr(nn, f"AdaptiveAvgPool{rank}d")(4))
            inputs = width
        make_pool, side = draw(pools(rank))
        parts += [make_pool(), draw(flattenings)()]
        repeat = side**rank
    for last in [False] * draw(st.integers(0 if rank else 1, 3)) + [True]:
        width = draw(st.integers(2, 5))
        add(nn.Linear(inputs * repeat, width, bias=draw(st.booleans())), width, 0, last)
        built.repeats[built.weighted[-1]] = repeat
        inputs, repeat = width, 1
    built.net = nest(parts, draw).double().eval()
    randomise(built.net)
    return built


def nest(parts: list[nn.Module], draw: st.DrawFn) -> nn.Sequential:
    """Wrap some consecutive parts in Sequentials."""
    while len(parts) > 3 and draw(st.booleans()):
        start = draw(st.integers(0, len(parts) - 2))
        end = draw(st.integers(start + 1, len(parts)))
        parts = [*parts[:start], nn.Sequential(*parts[start:end]), *parts[end:]]
    return nn.Sequential(*parts)


def randomise(net: nn.Module) -> None:
    for child in net.modules():
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if name != "num_batches_tracked" and isinstance(child, (*NORMS, nn.PReLU)):
                nn.init.uniform_(tensor, 0.5, 1.5)


def subsets(neurons, draw: st.DrawFn) -> list[list[int]]:
    """One to all neurons of each hidden layer, in any order."""
    return [
        draw(st.lists(st.integers(0, layer.width - 1), min_size=1, max_size=layer.width, unique=True))
        for layer in neurons.layers
    ]


@settings(max_examples=60, deadline=None)
@given(built=networks(with_mixing=False), data=st.data())
def test_a_cut_network_computes_what_the_masked_one_does(built, data):
    neurons = find_neurons(built.net)
    kept = subsets(neurons, data.draw)
    subnet = cut(built.net, neurons, kept)
    with masked(built.net, neurons, kept) as whole, torch.no_grad():
        torch.testing.assert_close(subnet(built.inputs), whole(built.inputs), rtol=1e-10, atol=1e-10)


# What stands between reading the size and the layer, the shape of the input.
KEPT = {
    "arithmetic": (lambda net, x: net.conv((x - net.mean) / 2), (5, 3, 4, 4)),
    "a layer and an activation": (lambda net, x: net.conv(net.first(x).relu()), (5, 3, 4, 4)),
    "pooling": (lambda net, x: net.conv(functional.avg_pool2d(x, 2)), (5, 3, 8, 8)),
    "channels last": (lambda net, x: net.conv(x.permute(0, 3, 1, 2)), (5, 4, 4, 3)),
    "permute of a tuple": (lambda net, x: net.conv(torch.permute(x, dims=(0, 3, 1, 2))), (5, 4, 4, 3)),
    "other dimensions are flattened": (lambda net, x: net.conv(x.flatten(1).view(x.size(0), 3, 4, 4)), (5, 48)),
    "a view with the batch": (lambda net, x: net.conv(x.view(x.size(0), 3, 4, 4)), (5, 48)),
    "a new dimension behind it": (lambda net, x: net.conv(x.unsqueeze(1).flatten(1, 2)), (5, 3, 4, 4)),
    "a part of each sample": (lambda net, x: net.conv(x[:, 1:]), (5, 4, 4, 4)),
    "a residual addition": (lambda net, x: net.conv(net.first(x) + x), (5, 3, 4, 4)),
}


class Kept(nn.Module):
    """Reads the batch's size at the beginning, and flattens with it at the end."""

    def __init__(self, path: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.path = path
        self.first, self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 3), nn.Linear(24, 2)
        self.register_buffer("mean", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size(0)
        return self.last(self.path(self, x).reshape(size, -1))


@pytest.mark.parametrize("name", KEPT)
def test_a_size_of_the_batch_may_be_read_before_operations_that_leave_it(name):
    path, shape = KEPT[name]
    net = Kept(path).double()
    neurons, x = find_neurons(net, "conv"), torch.randn(shape, dtype=torch.double)
    kept = [[4, 1]]
    subnet = cut(net, neurons, kept)
    with masked(net, neurons, kept) as whole, torch.no_grad():
        torch.testing.assert_close(subnet(x), whole(x))


def test_clips_whose_frames_were_folded_into_the_batch_are_not_taken_for_samples():
    """Columns of the last layer were given to other neurons than their own, in silence."""
    net = Kept(lambda net, x: net.conv(x.flatten(0, 1)))
    with pytest.raises(LayerSelectionError, match=r"'conv' cannot .* reach reshape\(\) to .*x\.flatten\(1\) says so"):
        find_neurons(net)


@settings(max_examples=40, deadline=None)
@given(built=networks(with_mixing=True), data=st.data())
def test_shapes_agree_in_training_and_the_tensors_are_as_small_as_they_should(built, data):
    neurons = find_neurons(built.net)
    kept = subsets(neurons, data.draw)
    subnet = cut(built.net, neurons, kept).train()
    assert subnet(built.inputs).shape == built.net(built.inputs).shape
    first = subnet.get_submodule(neurons.layers[0].name)
    assert first.weight.shape[0] == len(kept[0])
    assert {str(module) for module in subnet.modules() if isinstance(module, WEIGHTED)} == {
        str(rebuilt(module)) for module in subnet.modules() if isinstance(module, WEIGHTED)
    }


def rebuilt(layer: nn.Module) -> nn.Module:
    """A layer made anew from the shape of its weight."""
    rows, columns = layer.weight.shape[:2]
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(columns, rows, bias=bias)
    return type(layer)(columns, rows, layer.kernel_size, padding=layer.padding, bias=bias)


@settings(max_examples=40, deadline=None)
@given(built=networks(with_mixing=True))
def test_exactly_what_was_built_is_found(built):
    names = {module: name for name, module in built.net.named_modules()}
    neurons = find_neurons(built.net)
    hidden, indices = built.weighted[:-1], {layer: index for index, layer in enumerate(built.weighted)}
    width = {layer: layer.weight.shape[0] for layer in built.weighted}
    assert neurons.layers == tuple(HiddenLayer(names[layer], width[layer]) for layer in hidden)

    expected = {}
    for index, layer in enumerate(built.weighted):
        rows, columns = (index if layer in hidden else None), (index - 1 if index else None)
        expected[f"{names[layer]}.weight"] = Cut(rows, columns, built.repeats.get(layer, 1) if index else 1)
        if layer in hidden and layer.bias is not None:
            expected[f"{names[layer]}.bias"] = Cut(rows, None)
    for follower, layer in built.followers.items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(follower, name, None) is not None:
                expected[f"{names[follower]}.{name}"] = Cut(indices[layer], None)
    assert neurons.cuts == expected
    assert set(neurons.rescaled) == {
        (names[layer], index - 1) for layer, index in indices.items() if index and layer not in built.normed
    }
    assert len(neurons.rescaled) == len(set(neurons.rescaled))
    assert len(neurons.sizes) == 2 * len(hidden) + len(built.followers)

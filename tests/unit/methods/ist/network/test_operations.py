"""Networks whose hidden neurons cannot be dealt out, and the error messages."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, weight_norm

from resist_lightning import NeuronConfig
from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.network.discovery import find_neurons
from tests.helpers.refusals import Net, refusal

COMBINED = [
    (lambda net, x: net.c(x + net.b(net.a(x).relu())), "add"),
    (lambda net, x: net.c((h := net.a(x)) + net.b(h)), "add"),
    (lambda net, x: net.c(net.b(net.a(x)).sub(x)), "sub"),
    (lambda net, x: net.c(operator.iadd(net.b(net.a(x)), x)), "add"),  # fx writes it so
]


@pytest.mark.parametrize(("forward", "operation"), COMBINED)
def test_a_residual_addition_is_refused_and_points_to_resist(forward, operation):
    message = refusal(Net(forward))
    assert f"are combined by {operation} with another value of the network" in message
    assert 'in residual networks strategy="resist" deals out the blocks' in message
    assert f"{Path(__file__).name}:" in message
    assert "net.c(" in message, "the line of the user's code"


def views(net, x):
    return net.c(net.b(net.a(x).view(x.size(0), 2, 3).transpose(1, 2)))


NOT_PER_NEURON = [
    (lambda net, x: net.c(net.a(x).softmax(1)), "a", "reach softmax()"),
    (lambda net, x: net.c(functional.softmax(net.a(x), dim=1)), "a", "reach softmax()"),
    (lambda net, x: net.c(h := net.a(x)) + h.sum(1), "a", "reach sum(dim=1): only the positions"),
    (lambda net, x: net.c((h := net.a(x)) - h.mean(-1, keepdim=True)), "a", "reach mean(dim=-1): only the positions"),
    (lambda net, x: net.c(h := net.a(x)) + h.mean(0).sum(), "a", "reach mean(dim=0): only the positions"),
    (lambda net, x: net.c(h := net.a(x)) + h.sum(), "a", "reach sum(): only the positions"),
    (lambda net, x: net.c(net.a(x) @ net.b.weight), "a", "reach matmul() together with another value"),
    (lambda net, x: net.c(torch.matmul(net.a(x), x)), "a", "reach matmul() together with another value"),
    (lambda net, x: net.c(net.a(x)[:, [5, 4, 3, 2, 1, 0]]), "a", "reach getitem()"),
    (lambda net, x: net.c(net.a(x).chunk(2, dim=1)[0]), "a", "reach chunk()"),
    (views, "a", "reach view() to a shape that is not"),
    (lambda net, x: net.c(net.a(x).transpose(0, 1)), "a", "reach transpose()"),
    (lambda net, x: net.c(net.a(x) * net.b(x)), "a", "reach mul() together with another value"),
    (lambda net, x: net.c(net.a(x) * net.scale), "a", "reach mul() together with another value"),
    (lambda net, x: net.c(torch.cat([net.a(x), net.b(x)], 1)), "a", "are concatenated (cat)"),
    (lambda net, x: net.c(torch.cat([h := net.a(x), h], 1)), "a", "are concatenated (cat)"),
    (lambda net, x: net.c((h := net.a(x)) / h.size(1)), "a", "are counted (size, shape)"),
    (lambda net, x: net.c((h := net.a(x)) / h.shape[-1]), "a", "are counted (size, shape)"),
    (lambda net, x: net.c(h := net.a(x)) + torch.zeros(h.shape).sum(), "a", "are counted (size, shape)"),
    (lambda net, x: net.c(net.a(x).view(net.scale.size(0), -1)), "a", "reach view() to a shape that is not"),
    (lambda net, x: net.c(functional.layer_norm(net.a(x), (6,))), "a", "reach layer_norm()"),
    (lambda net, x: net.c(functional.max_pool1d(net.a(x), 2)), "a", "reach max_pool1d(), which is per neuron only"),
    (lambda net, x: net.c(functional.pad(net.a(x), (1, 0))), "a", "reach pad() in their own dimension"),
    (lambda net, x: net.c(net.conv(x).view(-1, 6)), "conv", "reach view() to a shape that is not (x.size(0), -1): a"),
    (lambda net, x: net.c(net.conv(x.flatten(0, 1)).reshape(x.shape[0], -1)), "conv", "reach reshape() to (n, -1)"),
    (lambda net, x: net.c(net.conv(torch.cat([x, -x])).view(x.size(0), -1)), "conv", "reach view() to (n, -1), w"),
    (lambda net, x: net.c(net.conv(x.view(-1, 3, 4, 4)).view(x.size(0), -1)), "conv", "reach view() to (n, -1), w"),
    (lambda net, x: net.c(net.conv(x.transpose(0, 1)).view(x.shape[:2][0], -1)), "conv", "reach view() to (n, -1), w"),
    (lambda net, x: net.c(net.conv(x[0]).view(x.size(0), -1)), "conv", "reach view() to (n, -1), w"),
    (lambda net, x: net.c(net.conv(x.unsqueeze(0)).view(x.size(0), -1)), "conv", "reach view() to (n, -1), w"),
    (lambda net, x: net.c(net.conv(x.permute(1, 0, 2)).view(x.size(0), -1)), "conv", "reach view() to (n, -1), w"),
    (lambda net, x: net.c(net.conv(x).view(x.shape[2:][0], -1)), "conv", "reach view() to a shape that is not"),
    (lambda net, x: net.c(net.conv(x).flatten()), "conv", "are flattened from dimension 0 to -1"),
    (lambda net, x: net.c(net.conv(x).squeeze()), "conv", "reach squeeze(), which is not known to be per neuron (fl"),
    (lambda net, x: net.c(net.conv(x)), "conv", "reach 'c' (Linear) in a dimension that it does not sum over"),
    (lambda net, x: net.c(net.conv(x).mean(1).flatten(1)), "conv", "reach mean(dim=1): only the positions"),
    (lambda net, x: functional.linear(net.a(x), net.c.weight), "a", "reach linear() together with another value"),
    (lambda net, x: functional.batch_norm(net.c(net.a(x) + 0 * net.scale), None, None), "a", "are combined by add"),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "layer", "operation"), NOT_PER_NEURON)
def test_an_operation_that_is_not_per_neuron_is_named_with_its_line(forward, layer, operation):
    message = refusal(Net(forward))
    assert f"hidden layer {layer!r} cannot be dealt out: its neurons {operation}" in message
    assert re.search(rf"\(\S*{Path(__file__).name}:\d+: .*net\.", message), message


def test_code_without_a_source_file_is_named_by_its_line():
    scope: dict[str, Callable[[Net, Tensor], object]] = {}
    exec(compile("\ndef forward(net, x):\n    return net.c(net.a(x).softmax(1))", "<typed>", "exec"), scope)
    assert "not known to be per neuron (<typed>:3).\n" in refusal(Net(scope["forward"]))


def test_neurons_that_reach_the_output_are_refused():
    def hidden_too(net, x):
        hidden = net.a(x).relu()
        return net.c(hidden), {"hidden": hidden}

    assert "'a' cannot be dealt out: its neurons reach the output" in refusal(Net(hidden_too))


def test_the_way_out_names_the_layers_that_can_be_dealt_out():
    net = Net(lambda net, x: net.c(net.b(net.a(x).softmax(1)).relu()))
    assert refusal(net).endswith("Leave it whole by naming the others: layers=['b'].")
    assert [layer.name for layer in find_neurons(net, ["b"]).layers] == ["b"]
    assert refusal(Net(lambda net, x: net.c(net.a(x).softmax(1)))).endswith("No other hidden layer can be dealt out.")


def test_a_parameter_that_a_forward_reads_is_refused():
    penalty = Net(lambda net, x: net.c(net.a(x)) + net.a.weight.square().sum())
    assert "divide 'a.weight', which a forward reads directly" in refusal(penalty)
    assert Path(__file__).name in refusal(penalty)
    statistic = Net(lambda net, x: net.c(net.norm(net.a(x))) * net.norm.running_var.mean(), norm=nn.BatchNorm1d(6))
    assert "divide 'norm.running_var', which a forward reads directly" in refusal(statistic)
    columns = Net(lambda net, x: net.c(net.a(x)) + net.c.weight.sum())
    assert "divide 'c.weight', which a forward reads directly" in refusal(columns)


def test_to_read_the_type_of_a_parameter_is_allowed():
    net = Net(lambda net, x: net.c(net.a(x.to(net.a.weight.dtype))))
    assert [layer.name for layer in find_neurons(net).layers] == ["a"]


def test_a_module_that_is_called_twice_is_refused():
    assert "'b' cannot be dealt out: its neurons are made by 'b' (Linear), which is called 2 times" in refusal(
        Net(lambda net, x: net.c(net.b(net.b(net.a(x)))))
    )
    norm = Net(lambda net, x: net.c(net.norm(net.b(net.norm(net.a(x))))), norm=nn.BatchNorm1d(6))
    assert "'a' cannot be dealt out: its neurons reach 'norm' (BatchNorm1d), which is called 2 times" in refusal(norm)
    relu = Net(lambda net, x: net.c(net.relu(net.b(net.relu(net.a(x))))), relu=nn.ReLU())
    assert len(find_neurons(relu).layers) == 2


def test_tied_weights_are_refused():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    net[4].weight = net[2].weight
    message = refusal(net)
    assert "hidden layer '2' cannot be dealt out" in message
    assert "several names: 2.weight, 4.weight (tied weights)" in message
    assert message.endswith("No other hidden layer can be dealt out.")


def test_a_module_under_two_names_is_refused():
    net = Net(lambda net, x: net.c(net.a(x)))
    net.again = net.a
    assert "several names: a.weight, again.weight (tied weights)" in refusal(net)


def test_a_parameter_that_is_used_outside_the_traced_child_is_refused():
    net = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), "decoder": nn.Linear(4, 6)}
    )
    net["decoder"].weight = net["encoder"][0].weight
    assert "several names: encoder.0.weight, decoder.weight" in refusal(net)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_layer_whose_weight_is_made_of_others_is_refused_by_name(change):
    net = Net(lambda net, x: net.c(net.b(net.a(x))))
    change(net.b)
    message = refusal(net)
    assert "'a' cannot be dealt out: its neurons reach 'b' (" in message
    assert "'b' cannot be dealt out: its neurons are made by 'b' (" in message
    assert "which has other tensors than its class" in message
    assert "a weight norm, a parametrization or a mask" in message


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), "a grouped or depthwise convolution (groups=6)"),
        (nn.Conv2d(6, 6, 3, groups=2), "a grouped or depthwise convolution (groups=2)"),
        (nn.ConvTranspose2d(6, 6, 3), "'reader' (ConvTranspose2d)"),
        (nn.BatchNorm2d(6, affine=False), None),
        (nn.InstanceNorm2d(6), None),
        (nn.GroupNorm(1, 6), None),
        (nn.GroupNorm(2, 6), "'reader' (GroupNorm), which is not a norm of exactly these 6 neurons"),
        (nn.LayerNorm((6, 4, 4)), "'reader' (LayerNorm), which is not a norm of exactly these 6 neurons"),
        (nn.LayerNorm(4), "'reader' (LayerNorm), which is not a norm of exactly these 6 neurons"),
        (nn.LocalResponseNorm(2), "'reader' (LocalResponseNorm), which is not per neuron"),
        (nn.Softmax2d(), "'reader' (Softmax2d), which is not per neuron"),
        (nn.ChannelShuffle(2), "'reader' (ChannelShuffle), which is not per neuron"),
        (nn.PReLU(6), None),
        (nn.LazyConv2d(6, 3), "which has no sizes yet"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_may_follow_a_convolution(reader, text):
    net = Net(lambda net, x: net.last(net.reader(net.conv(x)).relu().flatten(1)), reader=reader, last=nn.Linear(24, 2))
    if text is None:
        assert "conv" in [layer.name for layer in find_neurons(net).layers]
    else:
        message = refusal(net)
        assert "'conv' cannot be dealt out: its neurons reach" in message
        assert text in message


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (nn.LSTM(6, 6), "'reader' (LSTM)"),
        (nn.MultiheadAttention(6, 2), "'reader' (MultiheadAttention)"),
        (nn.TransformerEncoderLayer(6, 2, 6), "'reader' (TransformerEncoderLayer)"),
        (nn.Bilinear(6, 6, 6), "'reader' (Bilinear)"),
        (nn.Softmax(1), "'reader' (Softmax), which is not per neuron"),
        (nn.GLU(), "'reader' (GLU), which is not per neuron"),
        (nn.Unflatten(1, (2, 3)), "'reader' (Unflatten), which is not per neuron"),
        (nn.MaxPool1d(2), "'reader' (MaxPool1d), which is per neuron only before flattening"),
        (nn.InstanceNorm1d(6), "'reader' (InstanceNorm1d), which is not a norm of exactly"),
        (nn.PReLU(3), "which has 3 parameters for 6 neurons"),
        (nn.Conv1d(6, 6, 1), "'reader' (Conv1d) in a dimension that it does not sum over"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_may_not_follow_a_linear_layer(reader, text):
    inputs = {nn.Bilinear: 2, nn.MultiheadAttention: 3}.get(type(reader), 1)
    net = Net(lambda net, x: net.c(net.reader(*[net.a(x)] * inputs)), reader=reader)
    message = refusal(net)
    assert "'a' cannot be dealt out: its neurons reach" in message
    assert text in message


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_not_looked_into():
    compiled = torch.jit.trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.rand(1, 6))
    net = Net(lambda net, x: net.c(net.b(net.compiled(net.a(x)))), compiled=compiled)
    assert "'a' cannot be dealt out: its neurons reach 'compiled' (TopLevelTracedModule)" in refusal(net)
    assert [layer.name for layer in find_neurons(net, "b").layers] == ["b"]


def test_a_norm_behind_the_flattening_says_where_it_must_stand():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.BatchNorm1d(20), nn.Linear(20, 2))
    assert "must stand before the flattening" in refusal(net)


def test_inputs_that_the_neurons_do_not_divide_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(21, 2))
    assert "its neurons (5) do not divide the 21 inputs of '2'" in refusal(net)
    steps = nn.Sequential(nn.Linear(3, 5), nn.Flatten(), nn.Linear(20, 2))
    assert "its neurons (5) do not divide the 20 inputs of '2'" in refusal(steps), "(batch, 4, 5): not neighbours"


def test_many_refusals_are_counted():
    layers = [part for _ in range(8) for part in (nn.Linear(4, 4), nn.Softmax(1))]
    message = refusal(nn.Sequential(*layers, nn.Linear(4, 2)))
    assert message.count("cannot be dealt out: ") == 5
    assert "And 3 more" in message


def test_networks_with_the_same_tensors_are_refused_unless_layers_are_named():
    """A target network silently got weights of other neurons than its own."""
    both = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)) for name in ("net", "target")})
    assert "the networks 'net' and 'target' have tensors of the same names and shapes" in refusal(both, None)
    assert [layer.name for layer in find_neurons(both, ["net.*"]).layers] == ["net.0"]
    assert [layer.name for layer in find_neurons(both, ["net.*", "target.*"]).layers] == ["net.0", "target.0"]


MORE_DIMENSIONS = [nn.MaxPool2d(2), nn.ZeroPad2d((0, 0, 0, 8)), nn.AvgPool2d(3, 1, 1), nn.MaxPool3d(1)]


@pytest.mark.parametrize("module", MORE_DIMENSIONS, ids=str)
def test_pooling_of_more_dimensions_than_the_convolution_has_is_refused(module):
    """If the sizes happened to fit, neurons were pooled with each other."""
    assert "a convolution of as many" in refusal(
        nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), module, nn.Flatten(), nn.Linear(32, 2))
    )


def store(net, x):
    net.features = net.a(x)
    return net.c(net.features)


def store_in_list(net, x):
    net.kept = [net.a(x)]
    return net.c(net.kept[0])


@pytest.mark.parametrize("forward", [store, store_in_list])
def test_neurons_that_are_left_in_an_attribute_are_refused(forward):
    """A training_step that read the attribute silently computed its loss on a part of the features."""
    assert "are stored in an attribute of a module" in refusal(Net(forward))


def test_one_neuron_alone_is_not_normalised_away():
    net = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2))
    NeuronLayout(net, NeuronConfig(), 1)
    with pytest.raises(LayerSelectionError, match=r"'0' has 3 neurons for 2 workers, and 1 .*at most 1 workers"):
        NeuronLayout(net, NeuronConfig(), 2)

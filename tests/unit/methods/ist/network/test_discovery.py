"""Hidden neurons found in known networks, and the choice of layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import lightning
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning import Engine, NeuronConfig, NeuronSimulator
from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.network.discovery import describe, find_neurons
from resist_lightning.methods.ist.network.neurons import Cut, HiddenLayer, Neurons, Size
from tests.helpers.hand_written import DEPTH, Encoder
from tests.helpers.nets import on_meta


def found(module, choice=None, trained=None):
    """Names of the hidden layers; ``trained`` is the part of the module whose parameters an optimizer has."""
    ids = None if trained is None else {id(parameter) for parameter in trained.parameters()}
    return [layer.name for layer in find_neurons(module, choice, ids).layers]


def chain(*widths):
    """Linear layers with activations: hidden layers 0, 2, ..."""
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


class Perceptron(nn.Module):
    """A perceptron as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None, **_: object) -> Tensor:
        if mask is not None:
            x = x * mask
        hidden = functional.dropout(functional.relu(self.norm(self.first(x))), 0.5, self.training)
        return self.second(hidden * scale)


EXPECTED = Neurons(
    layers=(HiddenLayer("net.first", 6),),
    cuts={
        "net.first.weight": Cut(0, None),
        "net.first.bias": Cut(0, None),
        "net.norm.weight": Cut(0, None),
        "net.norm.bias": Cut(0, None),
        "net.norm.running_mean": Cut(0, None),
        "net.norm.running_var": Cut(0, None),
        "net.second.weight": Cut(None, 0),
    },
    sizes=(
        Size("net.first", "out_features", 0),
        Size("net.norm", "num_features", 0),
        Size("net.second", "in_features", 0),
    ),
    rescaled=(("net.second", 0),),
)


class WithForward(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = Perceptron(), nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(1)


class StepsOnly(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = Perceptron(), nn.CrossEntropyLoss()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


class Inherited(StepsOnly):
    """A subclass, also without a forward."""


@pytest.mark.parametrize("make", [WithForward, StepsOnly, Inherited, lambda: nn.ModuleDict({"net": Perceptron()})])
def test_a_perceptron_is_found_wherever_it_stands(make):
    found = find_neurons(make())
    assert replace(found, assumed=()) == EXPECTED
    assert found.assumed in ((), (("net", {"mask": None}),))  # if the call of the perceptron was not seen


def test_the_description_has_a_line_for_each_hidden_layer():
    assert describe(EXPECTED) == "net.first (6 neurons): rows of net.first, net.norm; columns of net.second"
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 2))
    assert describe(find_neurons(net)) == (
        "0 (5 neurons): rows of 0; columns of 3 (4 each)\n3 (7 neurons): rows of 3; columns of 4"
    )


def test_vgg_of_torchvision_is_found():
    vgg = on_meta(lambda: torchvision.models.vgg11_bn(num_classes=10))
    neurons = find_neurons(vgg)
    convolutions = [f"features.{index}" for index in (0, 4, 8, 11, 15, 18, 22, 25)]
    layers = [*convolutions, "classifier.0", "classifier.3"]
    assert [(layer.name, layer.width) for layer in neurons.layers] == list(
        zip(layers, (64, 128, 256, 256, 512, 512, 512, 512, 4096, 4096), strict=True)
    )
    assert neurons.cuts["features.4.weight"] == Cut(1, 0)
    assert neurons.cuts["features.26.running_var"] == Cut(7, None)
    assert neurons.cuts["classifier.0.weight"] == Cut(8, 7, 49)
    assert neurons.cuts["classifier.6.weight"] == Cut(None, 9)
    whole = set(vgg.state_dict()) - set(neurons.cuts)
    assert whole == {"classifier.6.bias", *(name for name in vgg.state_dict() if name.endswith("num_batches_tracked"))}
    assert neurons.rescaled == (("classifier.0", 7), ("classifier.3", 8), ("classifier.6", 9))
    assert Size("classifier.0", "in_features", 7, 49) in neurons.sizes


def test_two_readers_of_the_same_neurons_both_get_columns():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk(x).relu()
            return self.left(x), self.right(x)

    neurons = find_neurons(Branches())
    assert neurons.cuts["left.weight"] == neurons.cuts["right.weight"] == Cut(None, 0)
    assert neurons.rescaled == (("left", 0), ("right", 0))


@pytest.mark.parametrize(
    ("behind", "rescaled"),
    [
        ([nn.BatchNorm1d(6)], False),
        ([nn.LayerNorm(6)], False),
        ([nn.Identity(), nn.Dropout(), nn.BatchNorm1d(6)], False),
        ([nn.ReLU(), nn.BatchNorm1d(6)], True),
        ([nn.Identity()], True),
        ([], True),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_sum_that_no_norm_follows_straight_is_rescaled(behind, rescaled, last):
    """Also in the last layer."""
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), *behind, *([] if last else [nn.Linear(6, 2)]))
    assert (("2", 0) in find_neurons(net).rescaled) == rescaled
    assert "0" not in dict(find_neurons(net).rescaled)


@pytest.mark.parametrize(
    ("behind", "norms"),
    [
        ([nn.BatchNorm1d(6)], ("3",)),
        ([nn.Identity(), nn.Dropout(), nn.BatchNorm1d(6)], ("5",)),
        ([nn.BatchNorm1d(6, track_running_stats=False)], None),
        ([nn.LayerNorm(6)], None),
        ([nn.ReLU(), nn.BatchNorm1d(6)], None),
    ],
)
def test_norms_that_make_up_for_a_smaller_sum_only_while_they_train_are_named(behind, norms):
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), *behind, nn.Linear(6, 2))
    assert find_neurons(net).rescaled_if_frozen == (() if norms is None else (("2", 0, norms),))


def test_a_sum_that_goes_into_a_norm_and_elsewhere_is_rescaled():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 5), nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.b(self.a(x))
            return self.norm(x), x

    assert find_neurons(Two()).rescaled == (("b", 0),)


def test_a_decorated_forward_is_traced():
    class Decorated(Perceptron):
        @torch.enable_grad()
        def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            if mask is not None and mask.sum() > 0:
                x = x * mask
            return self.second(self.norm(self.first(x * scale)))

    assert found(Decorated()) == ["first"]


def test_embeddings_and_inputs_are_whole():
    net = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert set(find_neurons(net).cuts) == {"1.weight", "1.bias", "3.weight"}


def test_a_mean_over_positions_and_a_batch_norm_behind_it_are_per_channel():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, _, _, _ = x.shape
            return self.head(self.norm(self.conv(x).mean((-1, -2)).reshape(n, -1)))

    assert find_neurons(Pooled()).cuts["norm.running_mean"] == Cut(0, None)


class Modes(nn.Module):
    """Computes more in training, draws random numbers, and keeps its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        self.calls += 1
        if not self.training:
            return x
        self.kept = self.c(x * torch.rand(1) + torch.rand(1))
        return self.kept


@pytest.mark.parametrize("mode", [True, False])
def test_the_forward_of_training_is_traced_and_the_module_is_not_changed(mode):
    net = Modes().train(mode)
    net.a.eval()
    random = torch.get_rng_state()
    before = [dict(vars(child)) for child in net.modules()]
    assert found(net) == ["a", "b"]
    assert [dict(vars(child)) for child in net.modules()] == before
    assert torch.equal(random, torch.get_rng_state())


def test_a_module_is_not_changed_where_it_is_refused():
    class Branching(Modes):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    net = nn.Sequential(Modes(), nn.Linear(2, 3), Branching()).eval()
    with pytest.raises(LayerSelectionError, match="'2'"):
        find_neurons(net)
    assert not any(child.training for child in net.modules())
    assert [net[0].calls, hasattr(net[0], "kept")] == [0, False]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ["0", "2", "4"]),
        ("4", ["4"]),
        (["4", "0"], ["0", "4"]),
        ("[02]", ["0", "2"]),
        ("*", ["0", "2", "4"]),
        (lambda name, layer: layer.out_features > 5, ["2", "4"]),
    ],
)
def test_layers_are_chosen_by_glob_or_predicate(choice, expected):
    assert found(chain(3, 5, 6, 7, 2), choice) == expected


def test_a_layer_that_is_not_chosen_is_whole_on_both_sides():
    neurons = find_neurons(chain(3, 5, 6, 7, 2), ["0", "4"])
    assert neurons.cuts == {
        "0.weight": Cut(0, None),
        "0.bias": Cut(0, None),
        "2.weight": Cut(None, 0),
        "4.weight": Cut(1, None),
        "4.bias": Cut(1, None),
        "6.weight": Cut(None, 1),
    }
    assert neurons.rescaled == (("2", 0), ("6", 1))


def test_a_glob_matches_the_last_parts_of_a_name():
    assert found(nn.Sequential(chain(3, 5, 6), nn.ReLU(), chain(6, 7, 2)), "0.0") == ["0.0"]


def test_layers_that_cannot_be_divided_stay_whole_unless_they_are_named():
    net = nn.Sequential(nn.Linear(3, 5), nn.Softmax(1), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    assert found(net) == found(net, "2") == ["2"]
    assert describe(find_neurons(net)).endswith("\nWhole, as IST cannot divide them: 0 (layers='*' says why).")
    assert "Whole" not in describe(find_neurons(net, "2"))
    for choice in ("*", "0"):
        with pytest.raises(LayerSelectionError, match="'0' cannot"):
            find_neurons(net, choice)


def test_of_many_layers_some_are_listed():
    whole = [part for _ in range(7) for part in (nn.Linear(3, 3), nn.Softmax(1))]
    text = describe(find_neurons(nn.Sequential(*whole, *chain(*[3] * 9))))
    assert text.count(" neurons): rows of") == 5
    assert "\nAnd 2 more hidden layers.\nWhole, as IST cannot divide them: 0, 2, 4, 6, 8 and 2 more (lay" in text


def test_of_a_transformer_the_perceptrons_are_dealt_out_and_heads_are_refused_by_name():
    encoder = Encoder(norm_first=True)
    assert found(encoder, "*.up") == [f"blocks.{number}.up" for number in range(DEPTH)]
    with pytest.raises(
        LayerSelectionError, match=r"'blocks\.0\.qkv' cannot .* unflatten\(\), .*heads of attention stay whole"
    ):
        find_neurons(encoder, "*.qkv")


@pytest.mark.parametrize("choice", ["attention", "attention.*", "*.out_proj"])
def test_attention_of_torch_is_refused_by_name(choice):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.net = nn.MultiheadAttention(6, 2), chain(6, 5, 2)

        def forward(self, x):
            return self.net(self.attention(x, x, x)[0])

    with pytest.raises(
        LayerSelectionError, match=r"no hidden layer\. 'attention' \(MultiheadAttention\) stays whole: heads"
    ):
        find_neurons(Attends(), choice)
    assert found(Attends(), None) == ["net.0"]


@pytest.mark.parametrize("choice", ["6", "net.*", ["0", "nothing"], [], lambda name, layer: False])
def test_a_choice_that_matches_no_hidden_layer_lists_the_candidates(choice):
    """6 is the output layer."""
    with pytest.raises(LayerSelectionError, match=r"Hidden layers that can be dealt out: 0, 2, 4\."):
        find_neurons(chain(3, 5, 6, 7, 2), choice)


@pytest.mark.parametrize(
    ("module", "seen"),
    [
        (nn.Linear(3, 4), r"the module itself \(Linear\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), r"0 \(Linear\)"),
        (nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 5)}), r"a \(Linear\), b \(Linear\)"),
        (nn.Sequential(nn.Tanh()), "no Linear or Conv at all"),
    ],
)
def test_nothing_to_deal_out_lists_what_was_seen(module, seen):
    with pytest.raises(LayerSelectionError, match=f"nothing to deal out.* Seen: {seen}"):
        find_neurons(module)


class Taught(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = chain(4, 6, 2), chain(4, 6, 6, 2).requires_grad_(False)


def test_a_teacher_that_no_optimizer_has_stays_whole():
    """It requires gradients, as a module does that nobody told otherwise."""
    both = Taught().requires_grad_(True)
    assert found(both) == ["student.0", "teacher.0", "teacher.2"]
    assert found(both, trained=both.student) == ["student.0"]


class Finetuned(nn.Module):
    """A head on a pretrained network, both in one forward."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.head = chain(4, 6, 7, 5), chain(5, 8, 3)
        self.backbone.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "in no optimizer"])
def test_layers_that_do_not_train_stay_whole_unless_they_are_named(frozen):
    """They were dealt out, so a head learned from a random part of what its backbone had learned."""
    net = Finetuned(frozen)
    # The last layer of the backbone computes what it did, and the head that trains has columns of its neurons.
    assert found(net, trained=net.head) == ["backbone.4", "head.0"]
    assert found(net, ["backbone.*"], trained=net.head) == ["backbone.0", "backbone.2", "backbone.4"]
    net.backbone[0].bias.requires_grad_(True)
    assert found(net, trained=net) == (
        ["backbone.0", "backbone.4", "head.0"] if frozen else ["backbone.0", "backbone.2", "backbone.4", "head.0"]
    )


def test_a_network_of_which_nothing_trains_has_nothing_to_deal_out():
    net = chain(4, 6, 3)
    with pytest.raises(LayerSelectionError, match=r"nothing to deal out.* none of these trains \(frozen, or in no opt"):
        found(net, trained=nn.Linear(2, 2))


def test_processes_and_the_simulator_leave_the_same_layers_whole():
    net, config = Finetuned(frozen=False), NeuronConfig(local_steps=2)
    engine = Engine(net, [torch.optim.SGD(net.head.parameters(), 0.1)], config)
    simulator = NeuronSimulator(net, lambda copy: torch.optim.SGD(copy.head.parameters(), 0.1), config, 2)
    assert engine.layout.neurons == simulator.neurons
    assert engine.layout.parts() == ["backbone.4", "head.0"]


def test_a_frozen_network_beside_the_trained_one_stays_whole():
    """It was dealt out, too, so the student learned from a random part of its teacher."""
    assert found(Taught()) == ["student.0"]

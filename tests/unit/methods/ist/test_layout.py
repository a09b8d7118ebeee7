"""Sizes of the workers' parts of a model, bytes of a sync, and refusals before anything is sent."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from resist_lightning import Engine, ISTStrategy, LayerSelectionError, NeuronConfig
from resist_lightning.errors import CheckpointError
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.ist import NETS, Run, make_net, make_optimizer, slice_of
from tests.helpers.nets import on_meta
from tests.helpers.neuron_plans import keeper


def layout_of(net, workers, **settings):
    return NeuronLayout(net, NeuronConfig(**settings), workers)


def speech(hidden_layers):
    """The paper's networks: batch norm after every layer, no bias."""
    width = {1: 4096, 2: 8192}[hidden_layers]
    sizes = [4096, *[width] * hidden_layers, 35]
    parts = []
    for index, (a, b) in enumerate(pairwise(sizes)):
        parts += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=index < hidden_layers), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(
    ("hidden_layers", "workers", "weights"),
    [
        (1, 2, 8_460_288), (1, 4, 4_230_144), (1, 8, 2_115_072),
        (2, 2, 33_697_792), (2, 4, 12_654_592), (2, 8, 5_278_720),
    ],
)  # fmt: skip
def test_a_worker_has_an_equal_share_of_the_weights_of_the_papers_nets(hidden_layers, workers, weights):
    layout = layout_of(on_meta(lambda: speech(hidden_layers)), workers, min_share=0)
    width = {1: 4096, 2: 8192}[hidden_layers]
    norms = 2 * hidden_layers * width // workers
    assert layout.held_parameters(3) == [weights + norms] * workers
    # Section 2.5: the sum over all slices.
    inner = (hidden_layers - 1) * width**2 // workers
    assert sum(layout.held_parameters(3)) == 4096 * width + inner + 35 * width + 2 * hidden_layers * width


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("net", NETS)
def test_slices_have_the_shapes_of_the_neurons_that_a_worker_holds(net, workers):
    module = make_net(Run(NeuronConfig(), 0, net))
    layout = layout_of(module, workers)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for round in range(3):
        held = layout.partition(round)
        for worker in range(workers):
            for name, cut in layout.neurons.cuts.items():
                shape = list(named[name].shape)
                if cut.rows is not None:
                    shape[0] = len(held[cut.rows].held[worker])
                if cut.columns is not None:
                    shape[1] = len(held[cut.columns].held[worker]) * cut.repeat
                assert layout.held_shape(name, worker, round) == tuple(shape)
    assert set(named) == set(layout.shared) | set(layout.shapes)
    assert not set(layout.shared) & set(layout.shapes)


def test_of_one_worker_everything_is_held():
    module = make_net(Run(NeuronConfig(), 0))
    layout = layout_of(module, 1)
    assert layout.held_parameters(5) == [sum(parameter.numel() for parameter in module.parameters())]
    assert not layout.partial
    assert layout_of(module, 2).partial


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("momentum", ["reset", "keep", "travel"])
@pytest.mark.parametrize("net", ["mixed", "conv"])
def test_bytes_to_hand_over_are_those_of_all_entries_that_change_their_worker(net, momentum, optimizer):
    """Counted entry by entry from its places before and after; with its state if that travels."""
    run = Run(NeuronConfig(momentum=momentum, min_share=0), 0, net, optimizer, frozen=("0.weight",))
    module, workers = make_net(run), 3
    layout = NeuronLayout(module, run.config, workers)
    states = OptimizerStates([make_optimizer(run, module)])
    slots = {"sgd": 1, "adamw": 2}[optimizer] if momentum == "travel" else 0
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for round in range(3):
        expected = [{"merge": 0, "hand_over": 0, "state": 0} for _ in range(workers)]
        before, after = ([_holders(layout, round + next) for next in (0, 1)][next] for next in (0, 1))
        for name, cut in layout.neurons.cuts.items():
            tensor = named[name]
            trains = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).reshape(-1, tensor.dim()).tolist():
                neurons = (
                    None if cut.rows is None else index[0],
                    None if cut.columns is None else index[1] // cut.repeat,
                )
                old, new = (_place(holders, cut, neurons, workers) for holders in (before, after))
                if old != new:
                    expected[old]["hand_over"] += 4
                    expected[old]["state"] += 4 * slots * trains
        assert layout.hand_over_bytes(round, states) == expected
        assert all(sent["hand_over"] > 0 for sent in expected)


def _holders(layout, round):
    """For each layer, the worker of each neuron."""
    return [[p.holders(neuron)[0] for neuron in range(p.blocks)] for p in layout.partition(round)]


def _place(holders, cut, neurons, workers):
    row, column = neurons
    if row is None:
        return holders[cut.columns][column]
    mine = holders[cut.rows][row]
    if column is None or holders[cut.columns][column] == mine:
        return mine
    return keeper(len(holders[cut.rows]), workers, row)


# ------------------------------------------------------------------ comparison between workers


def test_workers_with_another_cut_have_another_digest():
    """Else they would send messages that the other does not expect."""
    module = make_net(Run(NeuronConfig(), 0))
    usual = NeuronConfig(seed=1)
    digests = {layout_of(module, 2, seed=1).digest()}
    for other in (
        {"seed": 2}, {"local_steps": 3}, {"momentum": "keep"}, {"batch_norm": "running"}, {"layers": "3"},
    ):  # fmt: skip
        digests.add(NeuronLayout(module, replace(usual, **other), 2).digest())
    digests.add(layout_of(module, 3, seed=1).digest())
    module[6] = nn.Linear(13, 7)
    module[7], module[8] = nn.PReLU(7), nn.Linear(7, 4)
    digests.add(layout_of(module, 2, seed=1).digest())
    assert len(digests) == 8


def test_what_a_checkpoint_says_of_who_held_what_differs_between_workers_and_rounds():
    layout = layout_of(make_net(Run(NeuronConfig(), 0)), 3)
    said = [layout.held(round) for round in range(4)]
    assert len({text for held in said for text in held}) == 12
    assert layout.held(0) == layout_of(make_net(Run(NeuronConfig(), 0)), 3).held(0)
    assert layout.held(0) != layout_of(make_net(Run(NeuronConfig(), 0)), 3, seed=1).held(0)


def test_it_says_in_words_what_was_chosen():
    layout = layout_of(make_net(Run(NeuronConfig(), 0)), 3, local_steps=7)
    assert layout.describe().startswith(
        "the neurons of 3 hidden layer(s) are dealt out to 3 worker(s); each has 1.64 holders; "
        "rounds of 7 local steps.\n0 (11 neurons): rows"
    )
    assert layout.parts() == ["0", "3", "6"]
    assert layout.describe_tensor("3.weight") == "its neurons' part of 3.weight"
    assert layout.describe_tensor("8.bias") == "shared tensor 8.bias"


def test_it_says_in_words_how_many_hold_a_neuron_and_what_changes():
    layout = layout_of(make_net(Run(NeuronConfig(), 0)), 4, local_steps=7, growth=(0.5, 1), finish_rounds=2)
    assert layout.describe().startswith(
        "the neurons of 3 hidden layer(s) are dealt out to 4 worker(s); each has 2.18 holders; rounds of 7 local "
        "steps, shares of [0.5, 1] of the neurons in turn, all neurons everywhere in the last 2.\n0 (11"
    )
    thin = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    assert "each worker has 0.2 of them: below a quarter, accuracy falls" in layout_of(thin, 5, min_share=0).describe()
    assert "accuracy falls" not in layout_of(thin, 5, min_share=0.25).describe()
    assert "holders" not in layout_of(thin, 2).describe()
    assert "each has 2.5 holders" in layout_of(thin, 5).describe()


# ------------------------------------------------------------------ refusals


def test_fewer_neurons_than_workers_are_refused_with_the_layer_and_ways_out():
    module = make_net(Run(NeuronConfig(), 0, "plain"))
    assert layout_of(module, 5, min_share=0).partition(0)[1].held  # one neuron each
    with pytest.raises(LayerSelectionError) as raised:
        layout_of(module, 6, min_share=0)
    said = str(raised.value)
    assert "layer '2' has 5 neurons for 6 workers" in said
    assert "Use at most 5 workers" in said
    assert "`layers`" in said
    assert layout_of(module, 6, layers="0", min_share=0).parts() == ["0"]
    assert all(layout_of(module, 6, min_share=0.4).partition(0)[1].held), "two neurons each"
    assert all(layout_of(module, 6).partition(0)[1].held), "by default half"


def test_growth_and_finish_need_the_end_of_the_run_and_the_share_once():
    net = make_net(Run(NeuronConfig(), 0))
    with pytest.raises(ValueError, match=r"finish_rounds=1 needs the number of local steps"):
        Engine(net, [torch.optim.SGD(net.parameters(), 0.1)], NeuronConfig(finish_rounds=1))
    with pytest.raises(ValueError, match=r"growth=\[0.5, 1\] and min_share=0.3 set the same thing"):
        NeuronConfig(growth=[0.5, 1], min_share=0.3)


def test_a_run_that_grows_and_ends_whole_holds_more_and_more():
    layout = layout_of(make_net(Run(NeuronConfig(), 0)), 4, growth=(0.1, 0.5), finish_rounds=1, local_steps=2)
    layout.plan_end(Clock(2), 10)
    first = [[len(held) for held in layout.partition(round)[0].held] for round in range(6)]
    assert first == [[3, 3, 3, 2]] * 2 + [[6] * 4] * 2 + [[11] * 4] * 2
    shapes = [layout.held_shape("3.weight", 0, round) for round in (0, 2, 4)]
    assert shapes == [(4, 3), (7, 6), (13, 11)]


def test_a_snapshot_of_a_run_with_other_shares_is_put_together_by_those_shares():
    """Its file has them; this run may use other shares and other workers."""
    net = make_net(Run(NeuronConfig(), 0))
    written = layout_of(net, 3, min_share=0.6)
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    states = []
    for worker in range(3):
        tensors = {name: slice_of(written, t.detach(), name, written.partition(4), worker) for name, t in named.items()}
        store = {}
        for name in written.inner():
            rows = kept_rows(len(named[name]), 3, worker)
            store[name] = named[name].detach()[rows.start : rows.stop]
        place = {"identity": written.identity(), "round": 4, "table": written.state_dict()}
        states.append({"place": place, "own": {"tensors": tensors, "store": store}})
    found = layout_of(net, 2).full_tensors(states)
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())


BAD = {
    "local_steps": (0, "at least 1"),
    "seed": (-1, "0 is a seed"),
    "momentum": ("nesterov", "choose one of 'reset', 'keep', 'travel'"),
    "batch_norm": ("sync", "choose one of 'recalibrate', 'running', 'batch'"),
    "check": ("always", "choose one of 'sampled', 'full', 'off'"),
    "min_share": (1.5, "every worker holds all neurons"),
    "finish_rounds": (-1, "0 means no finish"),
    "growth": ([1, 0.5], "not fall"),
    "non_finite": ("ignore", "choose one of 'raise', 'drop'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_refused_with_its_name_its_value_and_a_way_out(name):
    value, hint = BAD[name]
    for make in (NeuronConfig, ISTStrategy):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")) as raised:
            make(**{name: value})
        assert hint in str(raised.value)
    with pytest.raises(ValueError, match="recalibration_batches=0"):
        NeuronConfig(recalibration_batches=0)


@pytest.mark.parametrize("option", ["min_blocks", "blocks", "wire", "test_scale", "local_step"])
def test_options_of_other_methods_are_refused(option):
    for make in (NeuronConfig, ISTStrategy):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            make(**{option: 1})


class Odd(torch.optim.Optimizer):
    """An optimizer with state of another shape than its parameter, as in factored optimizers."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("per_row", torch.ones(parameter.shape[:1]))


@pytest.mark.parametrize("momentum", ["keep", "travel"])
@pytest.mark.parametrize("make", [Odd, torch.optim.Adafactor], ids=["Odd", "Adafactor"])
def test_state_that_cannot_be_cut_with_its_neurons_is_refused_unless_it_restarts(make, momentum):
    module = make_net(Run(NeuronConfig(), 0))
    with pytest.raises(ValueError, match=rf"momentum='{momentum}' cannot .* {make.__name__}.*momentum='reset'"):
        Engine(module, [make(module.parameters())], NeuronConfig(momentum=momentum))
    Engine(module, [make(module.parameters())], NeuronConfig(momentum="reset"))


@pytest.mark.parametrize(
    ("make", "slot"),
    [
        (torch.optim.Rprop, "step_size"),
        (partial(torch.optim.Adagrad, initial_accumulator_value=0.1), "sum"),
        (torch.optim.Adagrad, None),
        (torch.optim.Adamax, None),
        (partial(torch.optim.AdamW, weight_decay=0.5, amsgrad=True), None),
    ],
    ids=["Rprop", "filled Adagrad", "Adagrad", "Adamax", "AdamW"],
)
def test_state_that_does_not_begin_with_zeros_is_refused_where_entries_arrive_without_it(make, slot):
    """Zeros made Rprop's steps ten thousand times shorter, and Adagrad's as long as if nothing was accumulated."""
    module = make_net(Run(NeuronConfig(), 0))
    states = OptimizerStates([make(module.parameters())])
    said = f"gives zeros.*'{slot}' of .* begins with other values than zeros.*'reset'"
    for momentum in ("keep", "travel"):
        with pytest.raises(ValueError, match=said) if slot else nullcontext():
            states.check_travel(momentum, "'reset'", cut=True)


def test_an_optimizer_that_needs_all_parameters_at_once_is_refused():
    module = make_net(Run(NeuronConfig(), 0))
    with pytest.raises(ValueError, match="LBFGS flattens all parameters"):
        Engine(module, [torch.optim.LBFGS(module.parameters())], NeuronConfig())


def test_snapshots_of_another_network_are_refused():
    layout = layout_of(make_net(Run(NeuronConfig(), 0)), 2)
    other = layout_of(make_net(Run(NeuronConfig(), 0, "paper")), 2)
    state = {"place": {"identity": other.identity(), "round": 1}, "own": {"tensors": {}, "store": {}}}
    with pytest.raises(CheckpointError, match=r"the neurons of \[\['0', 12\], .* Resume with the same model"):
        layout.full_tensors([state])

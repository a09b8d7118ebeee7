"""A subnet computes what the full model computes when all other hidden neurons are silent (check 7 of section 8)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from resist_lightning import Engine, NeuronConfig, NeuronSimulator
from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.subnet import Subnet
from tests.helpers.cutting import spread
from tests.helpers.ist import (
    ONE_AT_A_TIME,
    Run,
    batch_of,
    make_net,
    make_optimizer,
    masked_forward,
    slice_of,
    start_engine,
)
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, train_step

WORKERS = 3


def silenced(net, engine, held, x):
    """Outputs of the full model with zeros for other neurons; where no norm follows, inputs are scaled."""
    neurons = engine.layout.neurons
    scaled = dict(neurons.rescaled)
    if not net.training:  # norms with fixed statistics do not make up for the smaller sum
        scaled.update({name: layer for name, layer, _ in neurons.rescaled_if_frozen})
    handles = []
    for name, cut in neurons.cuts.items():
        if cut.columns is None:
            continue
        width, kept = neurons.layers[cut.columns].width, held[cut.columns]
        owner = name.rpartition(".")[0]
        mask = torch.zeros(width * cut.repeat)
        mask[spread(kept, cut.repeat)] = width / len(kept) if owner in scaled else 1.0
        handles.append(net.get_submodule(owner).register_forward_pre_hook(partial(read, mask)))
    out = net(x)
    for handle in handles:
        handle.remove()
    return out


def read(mask, layer, inputs):
    return inputs[0] * mask.view([-1, *[1] * (inputs[0].dim() - 2)])


def compute(collective, run, training):
    """This worker's held neurons, its batch, and its subnet's outputs, gradients and state."""
    engine, _ = start_engine(run, collective)
    held = [list(partition.held[collective.worker]) for partition in engine.partition]
    x, y = batch_of(run, collective.worker, 0)
    subnet = engine.module.train(training)
    out = subnet(x)
    nn.functional.cross_entropy(out, y).backward()
    gradients = {name: parameter.grad for name, parameter in subnet.named_parameters()}
    state = clone_state(subnet)
    engine.abandon()
    return engine, held, x, y, out, gradients, state


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("net", ["paper", "mixed", "biased", "plain", "conv"])
def test_a_subnet_is_the_full_model_whose_other_neurons_are_silent(net, training):
    run = Run(NeuronConfig(seed=4), 0, net)
    for worker, result in enumerate(run_threads(compute, WORKERS, run, training)[0]):
        engine, held, x, y, out, gradients, state = result
        full = make_net(run).train(training)
        expected = masked_forward(run, full, held, x) if net == "mixed" else silenced(full, engine, held, x)
        nn.functional.cross_entropy(expected, y).backward()

        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
        partitions = engine.layout.partition(0)
        for name, parameter in full.named_parameters():
            mine = slice_of(engine.layout, parameter.grad, name, partitions, worker)
            torch.testing.assert_close(gradients[name], mine, rtol=1e-3, atol=1e-6, msg=name)
            assert parameter.grad.count_nonzero() == mine.count_nonzero(), f"{name} has a gradient elsewhere"
        assert any(gradient.any() for gradient in gradients.values())
        if training and net != "mixed":  # the forward by hand updates no statistics
            for name, buffer in full.named_buffers():
                torch.testing.assert_close(state[name], slice_of(engine.layout, buffer, name, partitions, worker))


def test_where_no_norm_follows_the_mean_over_subnets_of_a_linear_network_is_the_full_model():
    """Each worker's sum is scaled to the expected full sum; with equal shares of one layer, exactly."""
    run = Run(NeuronConfig(layers="0"), 0, "plain")
    full = make_net(Run(run.config, 0, "plain"))
    x, _ = batch_of(run, 0, 0)
    results, _ = run_threads(linear_part, 2, run, x)
    torch.testing.assert_close(sum(results) / 2, full[2](full[1](full[0](x))))


def part_before_a_norm(collective, run, x, trained):
    """Outputs of two layers and a batch norm in evaluation mode, which may have trained in a subnet before."""
    engine, optimizer = start_engine(run, collective)
    first, norm, activation, second, next_norm, *_ = engine.module
    if trained:
        train_step(engine.module, optimizer, (x, torch.zeros(len(x), dtype=torch.long)))
        engine.count_step()
    norm.eval(), next_norm.eval()
    before = second(activation(norm(first(x)))).detach()
    out, statistics = next_norm(before).detach(), next_norm.running_mean.clone()
    plain = nn.functional.linear(activation(norm(first(x))), second.weight, second.bias).detach()
    engine.abandon()
    return before, out, plain, engine.layout.seen(), statistics


def test_before_a_frozen_batch_norm_the_sum_is_scaled():
    """Its statistics are those of the sum over all neurons: the mean over subnets was half of it."""
    run = Run(NeuronConfig(layers="0"), 0, "biased")
    full, (x, _) = make_net(run), batch_of(run, 0, 0)
    full[1].eval(), full[4].eval()
    results, _ = run_threads(part_before_a_norm, 2, run, x, False)
    torch.testing.assert_close(sum(out for _, out, *_ in results) / 2, full[:5](x))
    assert all(seen == {"trained_norms": []} for *_, seen, _ in results)


def test_before_a_batch_norm_with_a_subnets_own_statistics_nothing_is_scaled():
    """As where a program freezes it in the middle of the training, or computes targets in evaluation mode."""
    run = Run(NeuronConfig(layers="0"), 0, "biased")
    x, _ = batch_of(run, 0, 0)
    for before, _, plain, seen, _ in run_threads(part_before_a_norm, 2, run, x, True)[0]:
        assert torch.equal(before, plain)
        assert seen == {"trained_norms": ["4"]}, "the first norm is behind the inputs, which are whole"


def test_a_resumed_run_knows_whose_statistics_its_norms_have():
    layout = NeuronLayout(make_net(Run(NeuronConfig(), 0, "biased")), NeuronConfig(), 2)
    layout.assume({"trained_norms": ["4"]})
    assert layout.seen() == {"trained_norms": ["4"]}
    layout.assume({})  # a checkpoint of an older version


def train_frozen(net, optimizer, batch, frozen):
    net.train()
    for norm in (net[1], net[4]):
        norm.train(not frozen)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


FREEZINGS = {"from the beginning": (True,) * 6, "later": (False,) * 3 + (True,) * 3, "at first": (True, *[False] * 5)}


@pytest.mark.parametrize("name", FREEZINGS)
def test_workers_with_frozen_norms_train_as_in_the_simulator(name):
    run = Run(NeuronConfig(local_steps=2, batch_norm="running"), 6, "biased")

    def train(collective):
        engine, optimizer = start_engine(run, collective)
        for step, frozen in enumerate(FREEZINGS[name]):
            train_frozen(engine.module, optimizer, batch_of(run, collective.worker, step), frozen)
            engine.after_step()
        engine.finish()
        return clone_state(engine.module)

    simulator = NeuronSimulator(make_net(run), lambda net: make_optimizer(run, net), run.config, 2)
    for step, frozen in enumerate(FREEZINGS[name]):
        for number, worker in enumerate(simulator.workers):
            train_frozen(worker.module, worker.optimizers[0], batch_of(run, number, step), frozen)
        simulator.after_step()
    expected = clone_state(simulator.full_model())
    for state in run_threads(train, 2)[0]:
        assert_equal_states(state, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_network_with_norms_is_one_graph_that_stays(frozen):
    layout = NeuronLayout(net := make_net(Run(NeuronConfig(), 0, "biased")), NeuronConfig(), 2)
    subnet, graphs = Subnet(layout, 0), []
    subnet.hold(0)
    for norm in (net[1], net[4]):
        norm.train(not frozen)

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    net.compile(backend=count, fullgraph=True)
    for _ in range(3):
        net(torch.ones(4, 6))
        subnet.note_norms()
    assert len(graphs) == 1


def linear_part(collective, run, x):
    engine, _ = start_engine(run, collective)
    first, activation, second, *_ = engine.module
    out = second(activation(first(x))).detach()
    engine.abandon()
    return out


def less_its_mean(module, args, output):
    output -= output.detach().mean(-1, keepdim=True)


def normalised(module, args):
    return (args[0] / args[0].detach().norm(dim=1, keepdim=True),)


def normalised_by_name(module, args, kwargs):
    return (nn.functional.normalize(args[0]),), kwargs


def noisy(module, args, output):
    output.register_hook(lambda gradient: gradient * 2)
    return output * torch.rand_like(output)


def reads(module, args, output):
    module.seen = [*getattr(module, "seen", []), len(output)]


def over_positions(module, args, output):
    return output.view(len(output), -1, 4).softmax(-1).flatten(1)


HOOKS = {
    "function": ("plain", 1, "hook", lambda module, args, output: output.softmax(-1), "from those of others"),
    "in place": ("plain", 1, "hook", less_its_mean, "from those of others"),
    "flattened": ("conv", 7, "hook", lambda module, args, output: output.softmax(-1), "from those of others"),
    "before": ("plain", 2, "pre-hook", normalised, "from those of others"),
    "with options": ("plain", 2, "pre-hook by name", normalised_by_name, "from those of others"),
    "shape": ("plain", 1, "hook", lambda module, args, output: output[:, :1], "of another shape"),
    "reads": ("plain", 1, "hook", reads, ""),
    "each alone": ("plain", 0, "hook", noisy, ""),
    "positions": ("conv", 7, "hook", over_positions, ""),
    "each alone before": ("plain", 2, "pre-hook", lambda module, args: args[0].clamp(-1, 1), ""),
    "whole input": ("plain", 0, "pre-hook", normalised, ""),
    "whole output": ("plain", 4, "hook", less_its_mean, ""),
}


def with_hook(collective, case):
    """The error of a forward with a hook, whether the hook is in its place after it, and what it has seen."""
    name, number, kind, hook, _ = HOOKS[case]
    run = Run(NeuronConfig(), 0, name)
    with ONE_AT_A_TIME:
        net = make_net(run)
        if kind == "hook":
            handle = net[number].register_forward_hook(hook)
        else:
            handle = net[number].register_forward_pre_hook(hook, with_kwargs=kind != "pre-hook")
        engine = Engine(net, [make_optimizer(run, net)], run.config, collective=collective)
    engine.start()
    error = ""
    try:
        for step in range(2):
            net(batch_of(run, 0, step)[0]).sum().backward()
    except LayerSelectionError as raised:
        error = str(raised)
    engine.abandon()
    hooks = {**net[number]._forward_hooks, **net[number]._forward_pre_hooks}
    return error, hooks[handle.id] is hook, getattr(net[number], "seen", [])


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_that_combines_neurons_is_refused_in_its_first_call(case):
    """No trace shows hooks of modules of torch.nn: subnets trained another function, in silence."""
    expected = HOOKS[case][-1]
    for error, in_place, seen in run_threads(with_hook, 2, case)[0]:
        assert expected in error
        assert bool(expected) == bool(error)
        assert in_place
        assert seen == [8, 8] * (case == "reads")

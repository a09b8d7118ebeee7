"""A subnet computes what the full model computes when all other hidden neurons are silent (check 7 of section 8)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from resist_lightning import NeuronConfig
from tests.helpers.cutting import spread
from tests.helpers.ist import Run, batch_of, make_net, masked_forward, slice_of, start_engine
from tests.helpers.threads import run_threads
from tests.helpers.training import clone_state

WORKERS = 3


def silenced(net, engine, held, x):
    """Outputs of the full model with zeros for other neurons; where no norm follows, inputs are scaled."""
    neurons = engine.layout.neurons
    scaled = dict(neurons.rescaled)
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


def linear_part(collective, run, x):
    engine, _ = start_engine(run, collective)
    first, activation, second, *_ = engine.module
    out = second(activation(first(x))).detach()
    engine.abandon()
    return out

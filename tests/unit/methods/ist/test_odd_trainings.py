"""Unusual trainings: accumulated gradients, other types, layers that freeze, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from resist_lightning import Engine, NeuronConfig, PartialModelError
from tests.helpers.ist import (
    ONE_AT_A_TIME,
    Run,
    batch_of,
    make_net,
    make_optimizer,
    start_engine,
    train_simulator,
)
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, train_step

MOMENTA = ("reset", "keep", "travel")
NETS = ("paper", "mixed", "biased", "plain", "conv")


# ------------------------------------------------------------------ in the middle of a batch


def accumulate(collective, run, watched):
    """Two batches a step; with ``watched``, the full model is assembled between them."""
    engine, optimizer = start_engine(run, collective)
    for step in range(run.steps):
        optimizer.zero_grad()
        for half in (0, 1):
            x, y = batch_of(run, collective.worker, 2 * step + half)
            nn.functional.cross_entropy(engine.module(x), y).backward()
            if watched:
                with engine.full_model("evaluation" if half else "checkpoint"):
                    pass
        optimizer.step()
        engine.after_step()
    engine.finish()
    return clone_state(engine.module)


def test_gradients_that_add_up_survive_a_look_at_the_full_model():
    run = Run(NeuronConfig(local_steps=2, batch_norm="running"), 5)
    plain, _ = run_threads(accumulate, 2, run, False)
    watched, _ = run_threads(accumulate, 2, run, True)
    assert_equal_states(watched[0], plain[0], exactly=True)


# ------------------------------------------------------------------ networks of other kinds


def identity_of_two_types(collective):
    """Three rounds without training of a network in bfloat16 with norms in float32, in channels_last memory."""
    run = Run(NeuronConfig(local_steps=1, batch_norm="running"), 0, "conv")
    with ONE_AT_A_TIME:
        net = make_net(run).to(torch.bfloat16).to(memory_format=torch.channels_last)
        net[1].to(torch.float32)
        engine = Engine(net, [make_optimizer(run, net)], run.config, collective=collective)
    first = clone_state(net)
    engine.start()
    for _ in range(3):
        engine.after_step()
    engine.finish()
    assert_equal_states(clone_state(net), first, exactly=True)
    return sorted({str(tensor.dtype) for tensor in first.values()})


def test_tensors_of_several_types_and_memory_formats_come_back_as_they_were():
    assert run_threads(identity_of_two_types, 3)[0] == [["torch.bfloat16", "torch.float32", "torch.int64"]] * 3


def train_on_channels_last(collective, run):
    with ONE_AT_A_TIME:
        net = make_net(run).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(run, net)
        engine = Engine(net, [optimizer], run.config, collective=collective)
    engine.start()
    for step in range(run.steps):
        x, y = batch_of(run, collective.worker, step)
        train_step(net, optimizer, (x.to(memory_format=torch.channels_last), y))
        engine.after_step()
        assert formats(net) == {True}
    engine.finish()
    assert formats(net) == {True}
    return clone_state(net)


def formats(net):
    """Whether weights of convolutions are in channels_last, a format that once was lost in the first round."""
    weights = [parameter for parameter in net.parameters() if parameter.dim() == 4]
    assert any(not weight.is_contiguous() for weight in weights)
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}


def test_the_memory_format_of_convolutions_changes_nothing():
    run = Run(NeuronConfig(local_steps=2, momentum="travel"), 5, "conv")
    states, _ = run_threads(train_on_channels_last, 2, run)
    assert_equal_states(states[0], train_simulator(run, 2).full_model().state_dict())


def thaw(net, step):
    """Train one layer from step 3 on, and another one only until then, as in fine-tuning."""
    net[3].requires_grad_(step >= 3)
    net[0].requires_grad_(step < 3)


def train_thawing(collective, run):
    engine, optimizer = start_engine(run, collective)
    for step in range(run.steps):
        thaw(engine.module, step)
        train_step(engine.module, optimizer, batch_of(run, collective.worker, step))
        engine.after_step()
    engine.finish()
    return clone_state(engine.module)


def test_what_trains_may_change_in_mid_round():
    for momentum in MOMENTA:
        run = Run(NeuronConfig(local_steps=2, momentum=momentum), 8)
        states, _ = run_threads(train_thawing, 3, run)
        simulator = train_simulator(Run(run.config, 0), 3)
        for step in range(run.steps):
            for number, worker in enumerate(simulator.workers):
                thaw(worker.module, step)
                train_step(worker.module, worker.optimizers[0], batch_of(run, number, step))
            simulator.after_step()
        assert_equal_states(states[0], simulator.full_model().state_dict())


# ------------------------------------------------------------------ bugs found in reviews


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(input=self.a(input=x).relu())


def call_by_name(collective):
    with ONE_AT_A_TIME:
        net = ByName()
        engine = Engine(net, [torch.optim.SGD(net.parameters(), 0.1)], NeuronConfig(), collective=collective)
    engine.start()
    x = torch.ones(2, 6)
    with torch.no_grad():
        found, expected = net(x), net.b.weight @ (2 * net.a(x).relu()).T + net.b.bias.unsqueeze(1)
    engine.finish()
    return found, expected.T


def test_a_layer_may_be_called_with_its_input_by_name():
    """The scaling of inputs looked for the first positional argument, and raised IndexError."""
    for found, expected in run_threads(call_by_name, 2)[0]:
        torch.testing.assert_close(found, expected)


def leave_state_behind(collective, run, how):
    """Set the momentum of a matrix that is frozen, or in a later group, to its weights; then sync."""
    with ONE_AT_A_TIME:
        net = make_net(run)
        late = [net[2].weight]
        others = [parameter for parameter in net.parameters() if parameter is not late[0]]
        optimizer = torch.optim.SGD(others if how == "group" else [*others, *late], 0.05, momentum=0.9)
        engine = Engine(net, [optimizer], run.config, collective=collective)
    engine.start()
    if how == "group":
        optimizer.add_param_group({"params": late})
    optimizer.state[late[0]]["momentum_buffer"] = late[0].detach().clone()
    late[0].requires_grad_(how == "group")
    for _ in range(run.config.local_steps):
        engine.after_step()
    left = optimizer.state.get(late[0], {}).get("momentum_buffer", torch.zeros(()))
    wrong = bool(((left != 0) & (left != late[0])).any())
    engine.finish()
    return wrong


@pytest.mark.parametrize("how", ["frozen", "group"])
@pytest.mark.parametrize("momentum", ["keep", "travel"])
def test_state_that_does_not_move_never_meets_other_neurons(momentum, how):
    """It stayed in place while the weights were dealt anew, so it silently became momentum of other entries."""
    run = Run(NeuronConfig(local_steps=2, momentum=momentum), 2, net="plain")
    assert not any(run_threads(leave_state_behind, 2, run, how)[0])


def copies_after_the_end(collective, run):
    engine, _ = start_engine(run, collective)
    engine.finish()
    return len(engine.sync._as_received)


def test_copies_of_the_round_are_let_go_at_the_end():
    run = Run(NeuronConfig(non_finite="drop"), 0)
    assert run_threads(copies_after_the_end, 2, run)[0] == [0, 0]


def lose_a_worker(collective, run):
    engine, _ = start_engine(run, collective)
    engine.abandon()
    net = engine.module
    with pytest.raises(PartialModelError, match=r"0.weight cannot be read: the training ended with an error"):
        net(torch.ones(2, 6)).sum().item()
    return all(parameter.is_meta for name, parameter in net.named_parameters() if name in engine.layout.shapes)


def test_after_an_error_what_is_left_of_a_subnet_raises_where_it_is_read():
    assert run_threads(lose_a_worker, 2, Run(NeuronConfig(), 0, net="plain"))[0] == [True, True]


def save_a_slice(collective, run):
    engine, optimizer = start_engine(run, collective)
    net = engine.module
    train_step(net, optimizer, batch_of(run, collective.worker, 0))
    for save in (lambda module: module.state_dict(), copy.deepcopy, pickle.dumps):
        with pytest.raises(PartialModelError, match=r"worker \d has only a part of the network in this round"):
            save(net)
        with engine.full_model():
            save(net)
    engine.after_step()
    engine.finish()
    net.state_dict()
    return copy.deepcopy(net)[0].weight.shape


def test_slices_are_not_saved_or_copied_as_if_they_were_the_model():
    run = Run(NeuronConfig(local_steps=2), 0, net="plain")
    assert run_threads(save_a_slice, 2, run)[0] == [make_net(run)[0].weight.shape] * 2


def start_with_adafactor(collective, run):
    with ONE_AT_A_TIME:
        net = make_net(run)
        optimizer = torch.optim.Adafactor(net.parameters())
        train_step(net, optimizer, batch_of(run, collective.worker, 0))
        engine = Engine(net, [optimizer], run.config, collective=collective)
    engine.start()
    train_step(net, optimizer, batch_of(run, collective.worker, 1))
    engine.after_step()
    engine.finish()
    return True


def test_state_that_cannot_be_cut_is_forgotten_at_the_start():
    """A checkpoint of ddp may bring it; it raised IndexError."""
    assert run_threads(start_with_adafactor, 2, Run(NeuronConfig(local_steps=1), 0, net="plain"))[0] == [True, True]

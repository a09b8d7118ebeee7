"""Whole trainings by engines in one process, whose workers are threads: what becomes of every entry.

With real processes: tests/distributed/test_ist_training.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resist_lightning import Engine, NeuronConfig
from tests.helpers.ist import (
    ONE_AT_A_TIME,
    Run,
    batch_of,
    full_state,
    make_net,
    make_optimizer,
    plain_training,
    slice_of,
    start_engine,
    train_engine,
    train_simulator,
)
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, train_step

MOMENTA = ("reset", "keep", "travel")
NETS = ("paper", "mixed", "biased", "plain", "conv")


@st.composite
def runs(draw):
    """Any short training of two to four workers."""
    net = draw(st.sampled_from(NETS))
    config = NeuronConfig(
        local_steps=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**30)),
        momentum=draw(st.sampled_from(MOMENTA)),
        batch_norm=draw(st.sampled_from(["recalibrate", "running", "batch"])),
        layers=draw(st.sampled_from([None, "0"])),
    )
    # Of a bias before batch norm the gradient is rounding, which Adam blows up to steps of full length.
    optimizer = draw(st.sampled_from(["sgd"] if net == "biased" else ["sgd", "adamw"]))
    return Run(config, draw(st.integers(1, 7)), net, optimizer), draw(st.integers(2, 4))


def train(collective, run):
    return train_engine(run, collective.worker, None, collective)[1]


@settings(max_examples=15)
@given(runs())
def test_workers_train_what_the_reference_trains(drawn):
    run, workers = drawn
    states, _ = run_threads(train, workers, run)
    assert_equal_states(states[0], train_simulator(run, workers).full_model().state_dict())
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)


def travel_without_training(collective, run):
    """Rounds in which no optimizer steps: slices are cut, handed over, and put together again."""
    engine, _ = start_engine(run, collective)
    seen = []
    for _ in range(run.steps):
        seen.append(full_state(engine))
        held = clone_state(engine.module)
        engine.after_step()
        assert engine.clock.step < run.config.local_steps
        seen.append(full_state(engine))
        assert held.keys() == clone_state(engine.module).keys()
    engine.finish()
    return [*seen, clone_state(engine.module)]


@settings(max_examples=15)
@given(runs())
def test_cutting_and_assembling_is_the_identity_and_so_is_every_hand_over(drawn):
    """Check 3 of section 8, over as many rounds as there are steps."""
    run, workers = drawn
    run = Run(NeuronConfig(local_steps=1, seed=run.config.seed, batch_norm="running"), run.steps, run.net)
    expected = clone_state(make_net(run))
    for states in run_threads(travel_without_training, workers, run)[0]:
        assert len(states) == 2 * run.steps + 1
        for state in states:
            assert_equal_states(state, expected, exactly=True)


def note_slices(collective, run):
    """For each step: the round, what this worker has before its sync, and the full model as it is seen there."""
    notes = []

    def note(engine, step):
        own = clone_state(engine.module)
        notes.append((engine.clock.round, own, full_state(engine)))

    engine, _ = train_engine(run, collective.worker, note, collective)
    return engine, notes


@settings(max_examples=15)
@given(runs())
def test_every_slice_is_in_the_full_model_as_its_worker_has_it_and_the_rest_is_as_it_was(drawn):
    """Checks 2 and 4 of section 8: a copy where one worker holds an entry, and not a bit where nobody does."""
    run, workers = drawn
    run = Run(NeuronConfig(local_steps=2, seed=run.config.seed, batch_norm="running"), run.steps, run.net)
    noted, _ = run_threads(note_slices, workers, run)
    engine = noted[0][0]
    cuts = engine.layout.neurons.cuts
    last = clone_state(make_net(run))
    for step in range(run.steps):
        (round, _, full) = noted[0][1][step]
        held = engine.layout.partition(round)
        written = {name: torch.zeros(last[name].shape, dtype=torch.int) for name in cuts if name in last}
        for worker in range(workers):
            own = noted[worker][1][step][1]
            for name, count in written.items():
                assert torch.equal(slice_of(engine.layout, full[name], name, held, worker), own[name])
                numbers = torch.arange(count.numel()).reshape(count.shape)
                count.view(-1)[slice_of(engine.layout, numbers, name, held, worker).reshape(-1)] += 1
        for name, count in written.items():
            assert count.max() == 1, "slices overlap"
            untouched = count == 0
            assert torch.equal(full[name][untouched], last[name][untouched])
            assert bool(untouched.any()) == (name in engine.layout.inner())
        last = full


@settings(max_examples=10)
@given(st.sampled_from(NETS), st.integers(1, 4), st.sampled_from(MOMENTA), st.integers(1, 9))
def test_one_worker_is_plain_training(net, local_steps, momentum, steps):
    """Check 1 of section 8, bit for bit; with the momentum that restarts, or goes on."""
    run = Run(NeuronConfig(local_steps=local_steps, momentum=momentum), steps, net)
    _, state = train_engine(run, 0)
    assert_equal_states(state, clone_state(plain_training(run)[0]), exactly=True)


# ------------------------------------------------------------------ the user's objects


def watch_objects(collective, run):
    net = make_net(run)
    optimizer = make_optimizer(run, net)
    seen = [(name, id(tensor), tensor.requires_grad) for name, tensor in [*net.named_parameters()]]
    hooked = []
    dict(net.named_parameters())["3.weight"].register_hook(lambda grad: hooked.append(tuple(grad.shape)))
    engine = Engine(net, [optimizer], run.config, collective=collective)
    engine.start()
    for step in range(run.steps):
        train_step(net, optimizer, batch_of(run, collective.worker, step))
        engine.count_step()
        with engine.full_model():
            assert seen == [(name, id(tensor), tensor.requires_grad) for name, tensor in net.named_parameters()]
        engine.sync_if_due()
        assert seen == [(name, id(tensor), tensor.requires_grad) for name, tensor in net.named_parameters()]
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [number for _, number, _ in seen]
    engine.finish()
    return hooked


def test_parameters_keep_their_identity_and_hooks_for_the_whole_run():
    run = Run(NeuronConfig(local_steps=2), 5, frozen=("6.weight",))
    (hooked,), _ = run_threads(watch_objects, 1, run)
    assert hooked == [(13, 11)] * 5


def sizes(module):
    names = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "normalized_shape")
    return {
        (name, key): getattr(child, key)
        for name, child in module.named_modules()
        for key in names
        if hasattr(child, key)
    }


def watch_sizes(collective, run):
    engine, optimizer = start_engine(run, collective)
    module = engine.module
    hooks = [len(child._forward_pre_hooks) for child in module.modules()]
    for step in range(run.steps):
        held = [len(partition.held[collective.worker]) for partition in engine.partition]
        told = sizes(module)
        for size in engine.layout.neurons.sizes:
            if size.attribute != "num_parameters":
                number = held[size.layer] * size.repeat
                assert told[size.module, size.attribute] in (number, (number,))
        with engine.full_model():
            full = sizes(module)
        assert sizes(module) == told
        train_step(module, optimizer, batch_of(run, collective.worker, step))
        engine.after_step()
        assert [len(child._forward_pre_hooks) for child in module.modules()] == hooks
    engine.finish()
    return full, sizes(module), sum(len(child._forward_pre_hooks) for child in module.modules())


def test_modules_know_their_widths_in_the_subnet_and_in_the_full_model():
    for net in NETS:
        run = Run(NeuronConfig(local_steps=1, batch_norm="running"), 3, net)
        expected = sizes(make_net(run))
        for seen, after, hooks in run_threads(watch_sizes, 3, run)[0]:
            assert seen == after == expected
            assert hooks == 0, "a scale is left on the module"


# ------------------------------------------------------------------ in the middle of a batch


def accumulate(collective, run, watched):
    """Two batches a step; with ``watched``, the full model is seen between them."""
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
    """Three rounds without training of a network in bfloat16 whose norms are in float32, on channels_last memory."""
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
    engine.finish()
    return clone_state(net)


def test_the_memory_format_of_convolutions_changes_nothing():
    run = Run(NeuronConfig(local_steps=2, momentum="travel"), 5, "conv")
    states, _ = run_threads(train_on_channels_last, 2, run)
    assert_equal_states(states[0], train_simulator(run, 2).full_model().state_dict())


def thaw(net, step):
    """Layers that begin to train later, as when a pretrained network is tuned."""
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


# ------------------------------------------------------------------ what reviews have found


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
    """Momentum that equals the weights, of a matrix that is frozen, or is in a group that came later; then a sync."""
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
    """It stayed in its place while the weights under it were dealt anew: momentum of other entries, in silence."""
    run = Run(NeuronConfig(local_steps=2, momentum=momentum), 2, net="plain")
    assert not any(run_threads(leave_state_behind, 2, run, how)[0])


def copies_after_the_end(collective, run):
    engine, _ = start_engine(run, collective)
    engine.finish()
    return len(engine._sync._as_received)


def test_copies_of_the_round_are_let_go_at_the_end():
    run = Run(NeuronConfig(non_finite="drop"), 0)
    assert run_threads(copies_after_the_end, 2, run)[0] == [0, 0]


def lose_a_worker(collective, run):
    engine, _ = start_engine(run, collective)
    engine.abandon()
    net = engine.module
    with pytest.raises((RuntimeError, NotImplementedError)):
        net(torch.ones(2, 6)).sum().item()
    return all(parameter.is_meta for name, parameter in net.named_parameters() if name in engine.layout.shapes)


def test_after_an_error_what_is_left_of_a_subnet_raises_where_it_is_read():
    assert run_threads(lose_a_worker, 2, Run(NeuronConfig(), 0, net="plain"))[0] == [True, True]


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

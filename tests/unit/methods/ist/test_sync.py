"""Whole trainings by engines in one process, whose workers are threads, checked entry by entry.

With real processes: tests/distributed/test_ist_training.py.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resist_lightning import Engine, NeuronConfig
from resist_lightning.methods.ist.layout import NeuronLayout
from tests.helpers.ist import (
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
from tests.helpers.strict_collective import run_strictly
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, train_step

MOMENTA = ("reset", "keep", "travel")
NETS = ("paper", "mixed", "biased", "plain", "conv")

ONE = {"min_share": 0}
HOLDERS = (ONE, ONE, {}, {"min_share": 0.6}, {"min_share": 1}, {"growth": (0.1, 0.5, 0.8)}, {**ONE, "finish_rounds": 1})
"""One holder for each neuron; the default; several; all; and a growing number."""


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
        **draw(st.sampled_from(HOLDERS)),
    )
    # The gradient of a bias before batch norm is rounding noise, which Adam blows up to steps of full length.
    optimizer = draw(st.sampled_from(["sgd"] if net == "biased" else ["sgd", "adamw"]))
    return Run(config, draw(st.integers(1, 7)), net, optimizer), draw(st.integers(2, 4))


def train(collective, run):
    return train_engine(run, collective.worker, None, collective)[1]


@settings(max_examples=8)
@given(runs())
def test_workers_train_what_the_reference_trains(drawn):
    run, workers = drawn
    states, _ = run_strictly(train, workers, run)
    assert_equal_states(states[0], train_simulator(run, workers).full_model().state_dict())
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)


def travel_without_training(collective, run):
    """Rounds in which no optimizer steps: slices are cut, handed over, and assembled again."""
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


@settings(max_examples=8)
@given(runs())
def test_cutting_and_assembling_is_the_identity_and_so_is_every_hand_over(drawn):
    """Check 3 of section 8, over as many rounds as there are steps; means of shared tensors may be rounded."""
    run, workers = drawn
    config = replace(run.config, local_steps=1, momentum="reset", batch_norm="running", layers=None)
    run = replace(run, config=config, steps=min(run.steps, 3))
    expected = clone_state(make_net(run))
    divided = NeuronLayout(make_net(run), run.config, workers).shapes.keys() & expected.keys()
    for states in run_threads(travel_without_training, workers, run)[0]:
        assert len(states) == 2 * run.steps + 1
        for state in states:
            assert_equal_states(state, expected)
            assert all(torch.equal(state[name], expected[name]) for name in divided)


def note_slices(collective, run):
    """For each step: the round, and this worker's tensors and the full model before the sync."""
    notes = []

    def note(engine, step):
        own = clone_state(engine.module)
        notes.append((engine.clock.round, own, full_state(engine)))

    engine, _ = train_engine(run, collective.worker, note, collective)
    return engine, notes


@settings(max_examples=8)
@given(runs())
def test_every_slice_is_in_the_full_model_as_its_worker_has_it_and_the_rest_is_as_it_was(drawn):
    """Checks 2 and 4 of section 8: a copy where one worker holds an entry, unchanged bits where none does."""
    run, workers = drawn
    config = NeuronConfig(local_steps=2, seed=run.config.seed, batch_norm="running", **ONE)
    run = Run(config, min(run.steps, 4), run.net)
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


@settings(max_examples=6)
@given(st.sampled_from(NETS), st.integers(1, 4), st.sampled_from(MOMENTA), st.integers(1, 9))
def test_one_worker_is_plain_training(net, local_steps, momentum, steps):
    """Check 1 of section 8, bit for bit; with momentum that restarts, or continues."""
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
    for net in ("mixed", "conv"):
        run = Run(NeuronConfig(local_steps=1, batch_norm="running"), 2, net)
        expected = sizes(make_net(run))
        for seen, after, hooks in run_threads(watch_sizes, 3, run)[0]:
            assert seen == after == expected
            assert hooks == 0, "a scale is left on the module"


def drop_one(collective, run):
    """Sync with NaN on worker 1: the full model before, the worker's tensors at the end, and the full model after."""
    engine, optimizer = start_engine(run, collective)
    began = full_state(engine)
    train_step(engine.module, optimizer, batch_of(run, collective.worker, 0))
    if collective.worker == 1:
        with torch.no_grad():
            engine.module[0].weight.fill_(torch.nan)
    had = clone_state(engine.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Left out"
        engine.after_step()
    full = full_state(engine)
    engine.abandon()
    return engine.layout, began, had, full


@pytest.mark.parametrize("share", [0.5, 1])
def test_a_worker_that_is_left_out_does_not_count_where_another_holds_the_neuron(share):
    run = Run(NeuronConfig(local_steps=1, batch_norm="running", non_finite="drop", min_share=share), 2)
    told, _ = run_threads(drop_one, 3, run)
    layout, began, _, full = told[0]
    held, alone = layout.partition(0), 0
    for name in ("0.weight", "3.weight", "8.weight"):
        total, count = torch.zeros_like(full[name]), torch.zeros_like(full[name])
        numbers = torch.arange(total.numel()).reshape(total.shape)
        for worker in (0, 2):
            mine = slice_of(layout, numbers, name, held, worker).flatten()
            total.view(-1)[mine] += told[worker][2][name].flatten()
            count.view(-1)[mine] += 1
        expected = torch.where(count > 0, total / count.clamp(min=1), began[name])
        torch.testing.assert_close(full[name], expected)
        alone += int((count == 0).sum())
    assert (alone > 0) == (share < 1), "of what nobody else holds, the beginning of the round stays"


def watch_evaluations(collective, run):
    """After each step: this worker's tensors, the full model if it has it, and bytes sent; and the final model."""
    found = []

    def look(engine, step):
        had, sent = clone_state(engine.module), collective.sent_bytes["evaluation"]
        with engine.full_model():
            seen = clone_state(engine.module) if engine.observation.whole else None
        assert_equal_states(clone_state(engine.module), had, exactly=True)
        found.append((had, seen, collective.sent_bytes["evaluation"] - sent))

    return found, train_engine(run, collective.worker, look, collective)[1]


@pytest.mark.parametrize(
    ("holders", "net", "optimizer"),
    [
        ({"min_share": 0.6}, "conv", "sgd"),
        ({"growth": (0.1, 0.5, 0.8)}, "mixed", "sgd"),
        ({**ONE, "finish_rounds": 1}, "mixed", "adamw"),
    ],
)
def test_worker_0_may_assemble_the_full_model_alone(holders, net, optimizer):
    """Training and observations are the same as if all workers assembled it, for fewer bytes."""
    config = NeuronConfig(local_steps=2, momentum="travel", batch_norm="running", **holders)
    everywhere, first = (
        run_threads(watch_evaluations, 3, Run(replace(config, evaluate_on=where), 4, net, optimizer))[0]
        for where in ("all", "first")
    )
    sent = {"all": 0, "first": 0}
    for worker in range(3):
        for (expected, full, bytes_of_all), (had, seen, bytes_of_first) in zip(
            everywhere[worker][0], first[worker][0], strict=True
        ):
            assert_equal_states(had, expected, exactly=True)
            assert (seen is None) == (worker > 0)
            if seen is not None:
                assert_equal_states(seen, full)
            sent["all"] += bytes_of_all
            sent["first"] += bytes_of_first
        assert_equal_states(first[worker][1], everywhere[worker][1], exactly=True)
    assert 0 < sent["first"] < sent["all"]


def end_on_first(collective, run):
    engine, optimizer = start_engine(run, collective)
    train_step(engine.module, optimizer, batch_of(run, collective.worker, 0))
    engine.after_step()
    engine.finish()
    absent = [name for name, parameter in engine.module.named_parameters() if parameter.is_meta]
    return engine.incomplete, bool(absent)


def test_after_the_training_worker_0_may_have_the_full_model_alone():
    run = Run(NeuronConfig(local_steps=2, evaluate_on="first", full_model_on="first"), 2, "mixed")
    assert run_threads(end_on_first, 3, run)[0] == [(False, False), (True, True), (True, True)]

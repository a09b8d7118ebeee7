"""Resuming a single worker; exact resumes of several are in ``tests/integration``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from resist_lightning import QSR, Config, Engine, PostLocal
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.errors import CheckpointError
from tests.helpers.training import (
    Run,
    assert_equal_states,
    batch_of,
    clone_state,
    engine_for,
    make_model,
    make_optimizer,
    train_step,
    trained_engine,
)


@pytest.mark.parametrize("scale", [None, 0.5, 0.3])
def test_stopping_after_a_sync_and_going_on_is_as_not_stopping(scale):
    """Contract 7, the engine's part: optimizer state is saved by the host, and here momentum restarts."""
    run = Run(Config(local_steps=3, test_scale=scale), steps=8)
    _, unbroken, _ = trained_engine(run, 8)

    engine, model, _ = trained_engine(run, 6, finish=False)
    with engine.full_model("checkpoint"):
        weights, state = clone_state(model), engine.checkpoint_state()
    assert (state["round"], state["step"], state["identity"]["workers"]) == (2, 0, 1)

    again = make_model(run)
    again.load_state_dict(weights)
    optimizer = make_optimizer(run, again)
    second = Engine(again, [optimizer], run.config)
    second.restore(state)
    second.start()
    for step in (6, 7):
        train_step(again, optimizer, batch_of(0, step))
        second.after_step()
    second.finish()
    assert_equal_states(clone_state(again), clone_state(unbroken), exactly=True)


def trained_from(weights, state, own, run, steps, *, wrapped):
    """Resume, with blocks in torch's checkpoint_wrapper or not; returns the parameters and the engine."""
    model = make_model(run)
    if weights is not None:
        model.load_state_dict(weights)
    if wrapped:
        model.section3 = nn.Sequential(*map(checkpoint_wrapper, model.section3))
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config)
    engine.restore(state, own)
    engine.start()
    for step in steps:
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
    return engine, model


@pytest.mark.parametrize("wrapped", ["before", "after"])
@pytest.mark.parametrize("with_own", [True, False])
def test_blocks_may_be_in_a_checkpoint_wrapper_in_one_run_and_not_in_the_next(wrapped, with_own):
    """Own tensors of other names ended the run; without them blocks kept the test-time scale, in silence."""
    run = Run(Config(local_steps=3, test_scale=0.3), steps=8)
    _, unbroken, _ = trained_engine(run, 8)
    engine, model = trained_from(None, {}, None, run, range(6), wrapped=wrapped == "before")
    with engine.full_model("checkpoint"):
        weights, state = dict(model.state_dict()), engine.checkpoint_state()
        own = engine.resumption.state_dict() if with_own else None
        weights = {name: tensor.clone() for name, tensor in weights.items()}

    engine, model = trained_from(weights, state, own, run, (6, 7), wrapped=wrapped == "after")
    engine.finish()
    parameters = [name for name, _ in unbroken.named_parameters()]  # running statistics count a second forward
    found, expected = model.state_dict(), unbroken.state_dict()
    assert_equal_states(*({name: each[name] for name in parameters} for each in (found, expected)), exactly=True)


def test_a_worker_s_own_state_of_another_optimizer_is_refused_before_the_start():
    run = Run(Config(local_steps=3), steps=8)
    engine, model, _ = trained_engine(run, 6, finish=False)
    with engine.full_model("checkpoint"):
        state, own = engine.checkpoint_state(), engine.resumption.state_dict()
    assert not own["optimizers"][0]["state"]  # between two rounds, which restart it
    again = Engine(model, [torch.optim.AdamW(model.parameters())], run.config)
    with pytest.raises(CheckpointError, match="with SGD, and does not fit AdamW"):
        again.restore(state, own)
    assert again.restore(state)  # the way out


@pytest.mark.parametrize(
    ("other", "saved", "round", "step"),
    [
        ({}, {"round": 4, "step": 2}, 4, 2),
        ({"workers": 2}, {"round": 4, "step": 2}, 5, 0),
        ({"workers": 2}, {"round": 4, "step": 0}, 4, 0),
        ({"seed": 9}, {"round": 4, "step": 1}, 5, 0),
        ({"blocks": ["other"]}, {"round": 4, "step": 1}, 5, 0),
        ({}, {"round": 4, "step": 3}, 5, 0),
    ],
)
def test_with_other_workers_or_another_seed_a_new_round_begins(other, saved, round, step):
    engine, _, _ = engine_for(Config(local_steps=3))
    identity = {**engine.layout.identity(), **other}
    full = {"scale": 1.0, "blocks": [], "originals": {}, "norm_statistics": {}}
    held = [list(range(engine.layout.schedule.blocks))]
    assert engine.restore({**saved, "identity": identity, "held": held, **full}) == (not other)
    engine.start()
    assert (engine.clock.round, engine.clock.step) == (round, step)


FULL = {"scale": 1.0, "blocks": [], "originals": {}, "norm_statistics": {}}


@pytest.mark.parametrize(
    ("rule", "saved", "length", "before"),
    [
        # The checkpoint's length, whatever the rate is now.
        (QSR(1, 0.1), {"local_steps": str(QSR(1, 0.1)), "steps_before": 9, "round_steps": 7}, 7, 9),
        # A new rule applies from here on: (0.1 / 0.05)², and 3.
        (QSR(1, 0.1), {"local_steps": "7", "steps_before": 9, "round_steps": 7}, 4, 9),
        (3, {"local_steps": "7", "steps_before": 9, "round_steps": 7}, 3, 9),
        (PostLocal(1, 3, 9), {"local_steps": "7", "steps_before": 9, "round_steps": 7}, 3, 9),
        # A checkpoint from before rounds could vary.
        (3, {}, 3, 12),
        (PostLocal(2, 5, 8), {}, 5, 8),
    ],
)
def test_where_a_run_was_is_resumed_with_the_length_of_its_round(rule, saved, length, before):
    engine, _, _ = engine_for(Config(local_steps=rule))
    place = {"identity": engine.layout.identity(), "held": [list(range(engine.layout.schedule.blocks))]}
    assert engine.restore({"round": 4, "step": 2, **place, **saved, **FULL})
    engine.start()
    assert (engine.clock.local_steps, engine.clock.steps_before, engine.clock.total_steps) == (
        length,
        before,
        before + 2,
    )
    state = engine.resumption.place()
    assert (state["round_steps"], state["steps_before"], state["local_steps"]) == (length, before, str(rule))


def one_of_two(steps):
    """The engine of one of two workers, for decisions without the other: rounds of three, the last two whole."""
    run = Run(Config(local_steps=3, min_blocks=1, finish_rounds=2), steps=0)
    model, collective = make_model(run), SoloCollective()
    collective.workers = 2
    return Engine(model, [make_optimizer(run, model)], run.config, collective=collective, total_steps=steps)


@pytest.mark.parametrize(
    ("round", "steps", "exact"),
    [
        *((round, 18, True) for round in range(6)),
        (1, 30, True),
        (3, 30, False),  # round 4, which was whole, decides what workers keep in round 3
        (4, 19, False),
        (5, 19, True),  # now the last but one
        (5, 30, False),
    ],
)
def test_a_run_that_is_prolonged_resumes_exactly_unless_its_last_rounds_had_begun(round, steps, exact):
    before = one_of_two(18)
    before.clock.round, before.clock.step, before.clock.steps_before = round, 1, 3 * round
    engine = one_of_two(steps)
    assert engine.restore({**before.resumption.place(), **FULL}) == exact
    engine.resumption.begin_round()
    clock = engine.clock
    assert (clock.round, clock.total_steps) == (round + (not exact), 3 * round + 1)
    rounds = clock.round + -(-(steps - clock.steps_before) // 3)
    assert [engine.layout.schedule.is_whole(rounds - back) for back in (3, 2, 1)] == [False, True, True]


@pytest.mark.parametrize(
    ("steps", "left", "planned"),
    [
        (18, 6, 18),  # the same training, of whose batches half had no step: as it was planned
        (30, 18, 24),  # prolonged, or in smaller batches
        (18, 18, 24),  # another training, from its first step
        (18, None, 18),  # a plain loop, which says how many there are from the beginning of the run
    ],
)
def test_steps_that_the_clock_has_not_counted_are_left_out_of_what_is_planned(steps, left, planned):
    before, engine = one_of_two(18), one_of_two(steps)
    before.clock.round, before.clock.steps_before = 2, 6
    engine.resumption.steps_left = left
    engine.restore({**before.resumption.place(), **FULL})
    assert engine.layout.total_steps == planned

    foreign = one_of_two(steps)
    foreign.resumption.steps_left = left
    foreign.restore({})
    foreign.resumption.begin_round()
    assert foreign.layout.total_steps == (steps if left is None else left)
    again = one_of_two(steps)
    again.resumption.steps_left = left
    again.restore({**foreign.resumption.place(), **FULL})
    assert again.layout.total_steps == foreign.layout.total_steps


def test_a_checkpoint_of_other_growth_begins_a_new_round():
    before, same, other, none = (
        engine_for(Config(local_steps=3, growth=growth), total_steps=30)[0].resumption
        for growth in ([0.25, 1], [0.25, 1], [0.25, 0.5, 1], None)
    )
    assert [each.restore({**before.place(), **FULL}, None) for each in (same, other, none)] == [True, False, False]


def test_the_rate_that_is_set_before_the_start_counts():
    engine, _, optimizer = engine_for(Config(local_steps=QSR(1, 0.1)))
    optimizer.param_groups[0]["lr"] = 0.02
    engine.start()
    assert engine.clock.local_steps == 25


def test_a_round_that_is_resumed_is_not_taken_for_too_long():
    """The rate at its beginning was taken for that of the new optimizer, which a warm-up begins with."""
    engine, model, optimizer = engine_for(Config(local_steps=QSR(1, 0.4, warmup_steps=4)))
    optimizer.param_groups[0]["lr"] = 0.1  # the checkpoint's
    rule, place = str(engine.config.local_steps), {"round": 4, "step": 15, "steps_before": 9, "round_steps": 16}
    same = {"identity": engine.layout.identity(), "held": [list(range(engine.layout.schedule.blocks))]}
    engine.restore({**place, **same, "local_steps": rule, **FULL})
    engine.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, optimizer, batch_of(0, 0))
        engine.after_step()
    assert (engine.clock.round, engine.clock.local_steps) == (5, 16)


def test_a_checkpoint_before_the_start_is_empty_and_restores_to_nothing():
    engine, _, _ = engine_for()
    assert engine.checkpoint_state() == {}
    engine.restore({})
    assert (engine.clock.round, engine.clock.step) == (0, 0)

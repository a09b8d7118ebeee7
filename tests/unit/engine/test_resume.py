"""Resuming one worker alone; exact resumes of several are in ``tests/integration``."""

from __future__ import annotations

import pytest

from resist_lightning import Config, Engine
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
    """Contract 7 as far as it is the engine's: optimizer state is the host's to save, and here momentum restarts."""
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


def test_a_checkpoint_before_the_start_is_empty_and_restores_to_nothing():
    engine, _, _ = engine_for()
    assert engine.checkpoint_state() == {}
    engine.restore({})
    assert (engine.clock.round, engine.clock.step) == (0, 0)

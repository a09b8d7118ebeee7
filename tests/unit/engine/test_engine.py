"""A single worker's engine: plain training, counting, and the end."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine
from resist_lightning.comm.byte_formulas import KINDS
from tests.helpers.nets import small_preact
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


def test_rounds_end_after_their_local_steps_and_momentum_restarts():
    engine, model, optimizer = engine_for(Config(local_steps=3))
    engine.start()
    seen = []
    for step in range(7):
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
        seen.append((engine.clock.round, engine.clock.step, bool(optimizer.state)))
    assert seen == [(0, 1, True), (0, 2, True), (1, 0, False), (1, 1, True), (1, 2, True), (2, 0, False), (2, 1, True)]


@pytest.mark.parametrize("momentum", ["keep", "travel"])
def test_momentum_may_go_on(momentum):
    engine, model, optimizer = engine_for(Config(local_steps=1, momentum=momentum))
    engine.start()
    twin = make_model(Run(Config(), steps=0))
    plain = make_optimizer(Run(Config(), steps=0), twin)
    for step in range(3):
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
        train_step(twin, plain, batch_of(0, step))
    assert_equal_states(clone_state(model), clone_state(twin), exactly=True)


@pytest.mark.parametrize(("variables", "warned"), [({"TORCHELASTIC_RUN_ID": "1"}, 1), ({}, 0)])
def test_one_of_several_processes_of_torchrun_that_have_no_group_says_so(variables, warned, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine_for(Config(local_steps=3))
    said = [str(each.message) for each in caught if "init_process_group" in str(each.message)]
    assert len(said) == warned
    assert all("alone, although torchrun has started 2" in text for text in said)


def test_counting_and_syncing_may_be_apart():
    engine, model, optimizer = engine_for(Config(local_steps=1))
    engine.start()
    train_step(model, optimizer, batch_of(0, 0))
    engine.count_step()
    assert engine.clock.due
    assert (engine.clock.round, engine.clock.step) == (0, 1)
    engine.sync_if_due()
    engine.sync_if_due()
    assert (engine.clock.round, engine.clock.step) == (1, 0)


def test_the_user_s_loop_may_hold_on_to_its_last_loss_and_logits():
    engine, model, optimizer = engine_for(Config(local_steps=1, min_blocks=1))
    engine.start()
    for step in range(3):
        optimizer.zero_grad()
        logits = model(batch_of(0, step)[0])
        loss = logits.sum()
        loss.backward()
        optimizer.step()
        engine.after_step()
    assert loss.requires_grad


def test_after_the_end_the_checkpoint_state_is_still_there():
    engine, _, _ = trained_engine(Run(Config(local_steps=3), steps=4), 4)
    assert (engine.checkpoint_state()["round"], engine.checkpoint_state()["step"]) == (1, 1)
    assert not engine.running
    assert set(engine.sent_bytes_by_worker) == set(KINDS)
    assert all(sent == [0] for sent in engine.sent_bytes_by_worker.values())


def test_the_end_leaves_no_hook_and_no_recorder():
    _, model, _ = trained_engine(Run(Config(local_steps=3, min_blocks=1, warmup_rounds=1, test_scale=0.5), steps=4), 4)
    for child in model.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
        assert "forward" not in child.__dict__


@pytest.mark.parametrize("call", [Engine.finish, Engine.begin_observation])
def test_what_needs_a_start_says_so(call):
    engine, _, _ = engine_for()
    with pytest.raises(RuntimeError, match=r"not running.*start\(\)"):
        call(engine)


def test_no_local_step_is_taken_on_the_full_model():
    engine, _, _ = engine_for()
    engine.start()
    with engine.full_model(), pytest.raises(RuntimeError, match="local step cannot be taken on the full model"):
        engine.after_step()


@pytest.mark.parametrize("finished", [False, True])
def test_a_step_before_the_start_or_after_the_end_says_so(finished):
    """Without ``start()``, local SGD would silently average networks that never were equal."""
    engine, _, _ = engine_for(Config(local_steps=1, blocks=[]))
    if finished:
        engine.start()
        engine.finish()
    with pytest.raises(RuntimeError, match=r"not running.*start\(\)"):
        engine.after_step()


def test_one_worker_alone_is_not_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_for(Config())


def test_several_optimizers_and_none():
    model = small_preact()
    one = torch.optim.SGD(model.section3.parameters(), 0.1, momentum=0.9)
    two = torch.optim.AdamW(model.head.parameters(), 0.1)
    engine = Engine(model, [one, two], Config(local_steps=1, momentum="reset"))
    engine.start()
    nn.functional.cross_entropy(model(batch_of(0, 0)[0]), batch_of(0, 0)[1]).backward()
    one.step()
    two.step()
    assert one.state
    assert two.state
    engine.after_step()
    assert not one.state
    assert not two.state


def test_a_full_model_inside_another_one_is_the_same_and_own_weights_come_back():
    engine, model, _ = engine_for(Config(local_steps=3, min_blocks=1, test_scale=0.5))
    engine.start()
    own = clone_state(model)
    with engine.full_model():
        full = clone_state(model)
        with engine.full_model() as inner:
            assert inner is model
            assert_equal_states(clone_state(model), full, exactly=True)
        assert engine.observing
    assert_equal_states(clone_state(model), own, exactly=True)
    assert any(not torch.equal(full[name], own[name]) for name in own), "scaled"


def test_calls_in_the_wrong_order_are_refused():
    engine, _, _ = engine_for()
    assert engine.checkpoint_state() == {}
    engine.start()
    with pytest.raises(RuntimeError, match=r"start\(\) is called once"):
        engine.start()
    with pytest.raises(RuntimeError, match=r"call restore\(\) before start\(\)"):
        engine.restore({})
    with pytest.raises(RuntimeError, match=r"inside `full_model\(\)`"):
        engine.checkpoint_state()


def test_the_test_time_scale_is_not_applied_twice():
    """``finish()`` inside of ``full_model()`` scaled twice, and a second ``start()`` trained the scaled weights."""
    engine, model, _ = engine_for(Config(local_steps=3, min_blocks=1, test_scale=0.5))
    engine.start()
    with engine.full_model():
        full = clone_state(model)
        with pytest.raises(RuntimeError, match=r"the full model already; leave `full_model\(\)` first"):
            engine.finish()
    engine.finish()
    assert_equal_states(clone_state(model), full, exactly=True)
    with pytest.raises(RuntimeError, match=r"start\(\) is called once.* restore\(\) the checkpoint_state\(\)"):
        engine.start()


@pytest.mark.parametrize("wrong", [{"optimizers": "one"}, {"config": {"local_steps": 5}}])
def test_arguments_of_another_kind_are_refused_with_the_right_form(wrong):
    module = small_preact()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizers = optimizer if "optimizers" in wrong else [optimizer]
    with pytest.raises(TypeError, match=r"Engine\(model, \[optimizer\], Config\(local_steps=50\)\)"):
        Engine(module, optimizers, wrong.get("config", Config()))

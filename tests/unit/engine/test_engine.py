"""The engine of one worker alone: plain training, observed, finished, checkpointed; and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine
from resist_lightning.comm.bytes import KINDS
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.ist.config import NeuronConfig
from tests.helpers.by_hand import chain
from tests.helpers.nets import Undeclared, mlp, small_preact
from tests.helpers.threads import ThreadCollective, run_threads
from tests.helpers.training import (
    Run,
    assert_equal_states,
    batch_of,
    clone_state,
    make_model,
    make_optimizer,
    train_step,
)


def engine_for(config=None, run=None):
    run = run or Run(config or Config(local_steps=3), steps=0)
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    return Engine(model, [optimizer], run.config), model, optimizer


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


def observed(model):
    return {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


def assert_untouched(before, after):
    assert before.keys() == after.keys()
    for name, (identity, value, grad) in before.items():
        assert (identity, grad) == (after[name][0], after[name][2])
        assert torch.equal(value, after[name][1])


@pytest.mark.parametrize("policy", ["recalibrate", "running", "batch"])
def test_observing_gives_back_weights_gradients_state_modes_and_random_numbers(policy):
    engine, model, optimizer = engine_for(Config(local_steps=9, min_blocks=2, test_scale=0.3, batch_norm=policy))
    engine.start()
    for step in range(2):
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
    before = observed(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
    modes, random = [child.training for child in model.modules()], torch.get_rng_state()

    for kind in ("evaluation", "checkpoint"):
        with engine.full_model(kind) as full:
            assert full is model
            assert engine.observing
            assert not torch.equal(model.section3[1].conv2.weight, before["section3.1.conv2.weight"][1])
            model.eval()(batch_of(0, 5)[0])
            torch.rand(3)
            model.train()

    assert not engine.observing
    assert_untouched(before, observed(model))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], s) for p, s in zip(model.parameters(), state, strict=True)
    )
    assert [child.training for child in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert (engine.clock.round, engine.clock.step) == (0, 2)


def test_observation_ends_also_when_the_evaluation_fails():
    engine, model, _ = engine_for(Config(local_steps=9, test_scale=0.3))
    engine.start()
    before = observed(model)
    with pytest.raises(KeyError), engine.full_model():
        raise KeyError("in the user's evaluation")
    assert not engine.observing
    assert_untouched(before, observed(model))


def test_the_full_model_is_the_training_model_with_scaled_branches():
    net = chain(0.8, (0.25, -0.5))
    engine = Engine(net, [], Config(blocks="body.*", test_scale=0.5, min_blocks=0))
    engine.start()
    x = torch.ones(1, 1, dtype=torch.float64)
    assert net(x).item() == pytest.approx(0.8 * 1.25 * 0.5)
    with engine.full_model():
        assert net(x).item() == pytest.approx(0.8 * 1.125 * 0.75)
    assert net(x).item() == pytest.approx(0.8 * 1.25 * 0.5)
    engine.finish()
    assert net(x).item() == pytest.approx(0.8 * 1.125 * 0.75)


def test_a_block_of_unknown_kind_stays_scaled_by_a_hook_and_the_checkpoint_says_so():
    net = mlp(Undeclared)
    engine = Engine(net, [], Config(blocks="body.*", test_scale=0.5, min_blocks=0))
    engine.start()
    x = torch.randn(2, 3)
    inside = net.stem(x)
    for block in net.body:
        inside = inside + 0.5 * (block(inside) - inside)
    expected = net.head(inside).detach()
    plain = net(x).detach()
    with engine.full_model():
        torch.testing.assert_close(net(x), expected)
        assert engine.checkpoint_state()["hooked"] == [f"body.{index}" for index in range(4)]
    torch.testing.assert_close(net(x), plain)
    engine.finish()
    torch.testing.assert_close(net(x), expected)


def test_batch_statistics_of_the_evaluated_batch():
    engine, model, optimizer = engine_for(Config(local_steps=9, batch_norm="batch"))
    engine.start()
    train_step(model, optimizer, batch_of(0, 0))
    engine.after_step()
    x = batch_of(0, 1)[0]
    twin = small_preact(track_running_stats=False)
    twin.load_state_dict(model.state_dict(), strict=False)
    running = model.eval()(x)
    with engine.full_model():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(model.eval()(x), running)


def test_a_warm_up_scales_the_training_and_observing_scales_once():
    net = chain(0.8, (0.25, -0.5))
    engine = Engine(net, [], Config(blocks="body.*", test_scale=0.5, min_blocks=0, warmup_rounds=1, local_steps=1))
    engine.start()
    x = torch.ones(1, 1, dtype=torch.float64)
    scaled, plain = 0.8 * 1.125 * 0.75, 0.8 * 1.25 * 0.5
    assert net(x).item() == pytest.approx(scaled)
    with engine.full_model():
        assert net(x).item() == pytest.approx(scaled)
    assert net(x).item() == pytest.approx(scaled)
    engine.after_step()
    assert net(x).item() == pytest.approx(plain)


@pytest.mark.parametrize("scale", [None, 0.5, 0.3])
def test_stopping_after_a_sync_and_going_on_is_as_not_stopping(scale):
    """Contract 7 as far as it is the engine's: optimizer state is the host's to save, and here momentum restarts."""
    run = Run(Config(local_steps=3, test_scale=scale), steps=8)
    _, unbroken, _ = trained(run, 8)

    engine, model, _ = trained(run, 6, finish=False)
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


def trained(run, steps, *, finish=True):
    engine, model, optimizer = engine_for(run=run)
    engine.start()
    for step in range(steps):
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
    if finish:
        engine.finish()
    return engine, model, optimizer


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


def test_after_the_end_the_checkpoint_state_is_still_there():
    engine, _, _ = trained(Run(Config(local_steps=3), steps=4), 4)
    assert (engine.checkpoint_state()["round"], engine.checkpoint_state()["step"]) == (1, 1)
    assert not engine.running
    assert set(engine.sent_bytes_by_worker) == set(KINDS)
    assert all(sent == [0] for sent in engine.sent_bytes_by_worker.values())


def test_the_end_leaves_no_hook_and_no_recorder():
    _, model, _ = trained(Run(Config(local_steps=3, min_blocks=1, warmup_rounds=1, test_scale=0.5), steps=4), 4)
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
    """With ``start()`` forgotten, local SGD would average networks that never were equal, without a word."""
    engine, _, _ = engine_for(Config(local_steps=1, blocks=[]))
    if finished:
        engine.start()
        engine.finish()
    with pytest.raises(RuntimeError, match=r"not running.*start\(\)"):
        engine.after_step()


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (torch.optim.LBFGS, Config(), "LBFGS"),
        (torch.optim.Adafactor, Config(momentum="travel"), "Adafactor"),
        (lambda p: torch.optim.SGD(p, 0.1), Config(min_blocks=9), "min_blocks=9"),
    ],
)
def test_what_cannot_work_is_refused_when_the_engine_is_made(make, config, message):
    model = small_preact()
    with pytest.raises(ValueError, match=message):
        Engine(model, [make(model.parameters())], config)


def test_one_worker_alone_is_not_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_for(Config())


def test_several_optimizers_and_none():
    model = small_preact()
    one = torch.optim.SGD(model.section3.parameters(), 0.1, momentum=0.9)
    two = torch.optim.AdamW(model.head.parameters(), 0.1)
    engine = Engine(model, [one, two], Config(local_steps=1))
    engine.start()
    nn.functional.cross_entropy(model(batch_of(0, 0)[0]), batch_of(0, 0)[1]).backward()
    one.step()
    two.step()
    assert one.state
    assert two.state
    engine.after_step()
    assert not one.state
    assert not two.state


@pytest.mark.parametrize(
    "config",
    [Config(min_blocks=0), Config(blocks=[]), NeuronConfig(), StageConfig()],
    ids=lambda config: type(config).__name__,
)
def test_a_lazy_module_is_refused_by_name_until_it_has_its_shapes(config):
    model = small_preact()
    model.head = nn.LazyLinear(4)
    model.extra = nn.LazyBatchNorm1d()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    names = r"^head\.weight, head\.bias, extra\.weight, extra\.bias, extra\.running_mean and 1 more"
    named = names + r": no shape yet\..* Call the module once"
    with pytest.raises(ValueError, match=named):
        Engine(model, [optimizer], config)

    model.extra = nn.Identity()
    with torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
    if isinstance(config, Config):
        Engine(model, [torch.optim.SGD(model.parameters(), 0.1)], config).start()


def short_training(collective: ThreadCollective, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, [optimizer], Config(local_steps=3, blocks=[]), collective=collective)
    engine.start()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        engine.after_step()
    engine.finish()


@pytest.mark.parametrize(("steps", "told"), [(2, 1), (3, 0)])
def test_a_plain_loop_that_is_shorter_than_a_round_is_told_at_its_end(steps: int, told: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_threads(short_training, 2, steps)
    messages = {str(w.message) for w in caught if "a round has local_steps=3" in str(w.message)}
    assert len(messages) == told

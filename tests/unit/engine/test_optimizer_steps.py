"""Every optimizer step is seen: one that is not counted gives a warning, one of an unknown optimizer an error."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import optimizer as global_hooks

from resist_lightning import Config, Engine
from resist_lightning.engine.optimizer_steps import StepWatch, Turns
from resist_lightning.schedule.progress import Clock
from tests.helpers.threads import ThreadCollective, run_threads


class Outer(torch.optim.SGD):
    """Makes another optimizer in its first step, and steps that."""

    inner = None

    def step(self, closure=None):
        self.inner = self.inner or torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)
        self.inner.step()


def engine_of(make=torch.optim.SGD, module=None):
    module = module or nn.Linear(2, 2)
    optimizer = make(module.parameters(), lr=0.1)
    engine = Engine(module, [optimizer], Config(local_steps=3, blocks=[]))
    engine.start()
    return engine, optimizer


def step(engine, optimizer):
    engine.module(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_a_loop_without_after_step_is_told_and_ends_in_no_model():
    engine, optimizer = engine_of()
    for _ in range(3):
        step(engine, optimizer)
    with pytest.warns(UserWarning, match=r"SGD took 4 steps.*engine\.after_step\(\)"):
        step(engine, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only one warning
        for _ in range(4):
            step(engine, optimizer)
    with pytest.raises(RuntimeError, match=r"took 8 step\(s\), but no local step was counted"):
        engine.finish()
    with pytest.raises(RuntimeError, match="never averaged"), engine.full_model():
        pass
    engine.abandon()


def test_the_full_model_may_be_seen_before_the_first_step_is_counted_and_no_training_ends_so():
    engine, optimizer = engine_of()
    step(engine, optimizer)
    with engine.full_model():
        pass
    with pytest.raises(RuntimeError, match=r"took 1 step\(s\), but no local step was counted"):
        engine.finish()
    engine.abandon()


@pytest.mark.parametrize("make", [torch.optim.SGD, Outer])
def test_a_loop_that_counts_hears_nothing_and_leaves_no_hook(make, recwarn):
    before = [
        len(hooks) for hooks in (global_hooks._global_optimizer_pre_hooks, global_hooks._global_optimizer_post_hooks)
    ]
    engine, optimizer = engine_of(make)
    for _ in range(7):
        step(engine, optimizer)
        step(engine, optimizer)  # two steps of a batch are one local step
        engine.after_step()
    engine.finish()
    assert engine.clock.total_steps == 7
    assert not recwarn.list
    assert before == [
        len(hooks) for hooks in (global_hooks._global_optimizer_pre_hooks, global_hooks._global_optimizer_post_hooks)
    ]


def test_an_optimizer_that_the_engine_does_not_know_is_refused_before_it_steps():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    engine, _ = engine_of(module=module)
    stranger, apart = torch.optim.Adam(module[1].parameters()), torch.optim.Adam([nn.Parameter(torch.ones(1))])
    before = module[1].weight.detach().clone()
    module(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"Adam steps parameters of the module.*configure_optimizers.*Engine"):
        stranger.step()
    assert torch.equal(module[1].weight, before)
    apart.step()
    engine.abandon()
    stranger.step()


def write(module):
    with torch.no_grad():
        module.weight.sub_(0.1)


def test_batches_that_change_parameters_without_an_optimizer_are_refused():
    module = nn.Linear(2, 2)
    engine = engine_of(module=module)[0]
    watch = StepWatch(engine.layout, engine.states, Clock(3))
    watch.begin()
    for _ in range(11):  # gradients of four batches accumulate
        watch.check_batch(accumulated=4)
        watch.check_batch(accumulated=4)
        write(module)
    watch.check_batch(accumulated=4)
    write(module)
    with pytest.raises(
        RuntimeError, match=r"12 batches changed parameters, but no optimizer of `configure_optimizers`"
    ):
        watch.check_batch(accumulated=4)
    watch.note_local_step()
    watch.check_batch(accumulated=4)
    watch.end()


def test_an_engine_that_nobody_ends_is_forgotten_and_refuses_no_other_model():
    engine, optimizer = engine_of()
    module = weakref.ref(engine.module)
    del engine, optimizer
    gc.collect()

    assert module() is None
    other = nn.Linear(2, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def test_a_parameter_that_was_replaced_is_no_longer_the_engine_s():
    engine, _ = engine_of()
    old = engine.module.weight
    engine.module.weight = nn.Parameter(torch.zeros(2, 2))

    torch.optim.SGD([old], lr=0.1).step()

    with pytest.raises(RuntimeError, match="is not registered"):
        torch.optim.SGD([engine.module.weight], lr=0.1).step()
    engine.abandon()


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


def turn(turns, optimizers):
    for optimizer in optimizers:
        turns.note(optimizer)
    turns.end_step()


def test_optimizers_of_late_gradients_may_begin_and_end_apart_but_not_take_turns():
    layers = [nn.Linear(2, 2) for _ in range(3)]
    first, second, outside = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
    late = {id(parameter) for layer in layers[:2] for parameter in layer.parameters()}
    turns = Turns(late)
    for together in ([first], [first, outside], [first], [second, first, outside], [second], [outside], [second]):
        turn(turns, together)
    with pytest.raises(RuntimeError, match=r"SGD steps again after.*toggle_optimizer.*delay=0"):
        turns.note(first)
    turns = Turns(())
    for one in (first, second, first):
        turn(turns, [one])

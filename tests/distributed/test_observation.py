"""Contracts 6 and 8: observing changes nothing, and shows the full model as if the round ended there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from resist_lightning import Config, Engine, Simulator
from resist_lightning.comm.byte_formulas import TRAINING_KINDS
from resist_lightning.methods.resist.bytes import observation_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.observed import observed
from resist_lightning.schedule.transfers import plan_sync
from tests.helpers.processes import run_workers
from tests.helpers.training import (
    Run,
    SmallRun,
    assert_equal_states,
    batch_of,
    clone_state,
    make_model,
    make_optimizer,
    present_state,
    train_step,
)
from tests.helpers.wire import collectives_so_far

STEPS = 5
RUNS = {
    "momentum travels": SmallRun(
        Config(local_steps=3, min_blocks=2, momentum="travel"), steps=STEPS, optimizer="adamw"
    ),
    "another scale, running statistics": Run(
        Config(local_steps=3, min_blocks=0, batch_norm="running", test_scale=0.3), steps=STEPS
    ),
    "fragments, warm-up, batch statistics": SmallRun(
        Config(local_steps=2, min_blocks=2, fragments=2, momentum="keep", warmup_rounds=1, batch_norm="batch"),
        steps=STEPS,
    ),
    "first, fragments": SmallRun(
        Config(local_steps=2, min_blocks=3, fragments=3, momentum="travel", evaluate_on="first"), steps=STEPS
    ),
    "first, warm-up, int8, outer": SmallRun(
        Config(local_steps=2, min_blocks=1, warmup_rounds=1, wire="int8", outer="nesterov", evaluate_on="first"),
        steps=STEPS,
    ),
}


@dataclass
class History:
    """A worker's tensors and its view of the full model after each step, and the bytes it sent for this, and when."""

    trained: list[dict[str, Tensor]]
    random: Tensor
    full: list[dict[str, Tensor]]
    logits: list[Tensor]
    silent_ends: bool
    sent: list[tuple[int, int, int]]


def train(worker: int, run: Run, *, observe: bool) -> History:
    torch.manual_seed(worker)
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config)
    engine.start()
    history = History([], torch.empty(0), [], [], True, [])
    for step in range(run.steps):
        train_step(model, optimizer, batch_of(worker, step))
        engine.count_step()
        if observe:
            look(engine, history, worker)
        engine.sync_if_due()
        if observe and step % 2:
            look(engine, History([], torch.empty(0), [], [], True, history.sent), worker)
        history.trained.append(all_that_is_trained(model, optimizer))
    torch.rand(worker + 1)
    history.random = torch.get_rng_state()
    engine.abandon()
    return history


def look(engine: Engine, history: History, worker: int) -> None:
    """Evaluate as users do: evaluation mode, no gradient, random numbers drawn, and back to training."""
    sent = [engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS]
    before_it = sent_for_full_models(engine)
    with engine.full_model("checkpoint" if len(history.full) % 2 else "evaluation") as full:
        torch.rand(worker + 3)
        if engine.observation.whole:
            with torch.no_grad():
                history.logits.append(full.eval()(batch_of(0, 99)[0]))
            history.full.append(clone_state(full))
            full.train()
        else:
            history.full.append(present_state(full))
        before = collectives_so_far()
    history.silent_ends &= collectives_so_far() == before
    assert [engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS] == sent
    history.sent.append((engine.clock.round, engine.clock.step, sent_for_full_models(engine) - before_it))


def sent_for_full_models(engine: Engine) -> int:
    return engine.collective.sent_bytes["evaluation"] + engine.collective.sent_bytes["checkpoint"]


def all_that_is_trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers, gradients and optimizer state that the worker has, by name."""
    found = present_state(model)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"{name} gradient"] = parameter.grad.clone()
        for slot, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {slot}"] = value.clone()
    return found


def train_both(worker: int) -> dict[str, tuple[History, History]]:
    return {name: (train(worker, run, observe=False), train(worker, run, observe=True)) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def histories() -> list[dict[str, tuple[History, History]]]:
    """For each of three workers and each run: alone, and observed at every step."""
    return run_workers(train_both, 3)


@pytest.mark.parametrize("name", RUNS)
def test_observed_at_every_step_the_training_is_the_same_bit_for_bit(histories, name):
    for worker in histories:
        plain, observed = worker[name]
        assert len(plain.trained) == STEPS
        for before, after in zip(plain.trained, observed.trained, strict=True):
            assert_equal_states(after, before, exactly=True)
        assert torch.equal(plain.random, observed.random)


@pytest.mark.parametrize("name", RUNS)
def test_the_full_model_in_the_middle_of_a_round_is_as_if_the_round_ended_there(histories, name):
    for step, (state, logits) in enumerate(simulated(RUNS[name], workers=3)):
        first = histories[0][name][1].full[step]
        assert_equal_states(first, state)
        for worker in histories:
            if name.startswith("first"):  # worker 0 alone has the full model
                torch.testing.assert_close(histories[0][name][1].logits[step], logits, rtol=1e-3, atol=1e-4)
                break
            assert_equal_states(worker[name][1].full[step], first, exactly=True)
            torch.testing.assert_close(worker[name][1].logits[step], logits, rtol=1e-3, atol=1e-4)


def test_what_a_full_model_sends_is_the_closed_form(histories):
    equal = set()
    for name, run in RUNS.items():
        layout = BlockLayout(make_model(run), run.config, 3)
        at_first = run.config.evaluate_on == "first"
        for worker, history in enumerate(histories):
            sent = history[name][1].sent
            assert len(sent) == STEPS + STEPS // 2
            for round, step, size in sent:
                plan = plan_sync(layout.partition(round), layout.partition(round + 1))
                unequal = step > 0 or not run.config.equal_after_sync
                expected = observation_bytes(plan, observed(layout), 3, unequal=unequal, at_first=at_first)
                assert size == expected[worker], (name, worker, round, step)
                if step == 0:
                    equal.add(at_first)
    assert equal == {True, False}  # right after a sync


def simulated(run: Run, workers: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The oracle's full model after each step, before the sync that may follow it."""
    simulator = Simulator(make_model(run), lambda model: make_optimizer(run, model), run.config, workers)
    seen = []
    for step in range(run.steps):
        for number, worker in enumerate(simulator.workers):
            train_step(worker.module, worker.optimizers[0], batch_of(number, step))
        full = simulator.full_model().eval()
        with torch.no_grad():
            seen.append((clone_state(full), full(batch_of(0, 99)[0])))
        simulator.after_step()
    return seen


@pytest.mark.parametrize("name", [name for name in RUNS if "batch statistics" not in name])
def test_a_checkpoint_is_a_plain_model_that_computes_what_was_observed(histories, name):
    """With batch statistics it cannot be; the library warns of this (tests/unit/methods/resist/test_layout.py)."""
    for step in range(STEPS):
        seen = histories[0][name][1]
        plain = make_model(RUNS[name])
        plain.load_state_dict(seen.full[step], strict=True)
        with torch.no_grad():
            logits = plain.eval()(batch_of(0, 99)[0])
        torch.testing.assert_close(logits, seen.logits[step], rtol=0, atol=0)


def test_going_back_to_training_sends_nothing(histories):
    assert all(worker[name][1].silent_ends for worker in histories for name in RUNS)


class WritesData(torch.optim.Optimizer):
    """Like some optimizers outside of torch, it writes past autograd's version counters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def make_written(model: torch.nn.Module) -> torch.optim.Optimizer:
    return WritesData(model.parameters())


def make_blocks_only(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Freeze all shared layers; only the blocks, each held by two of three workers, train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("body.") and not name.startswith("body.0."))
    return torch.optim.SGD(model.parameters(), 0.05)


def make_usual(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05)


SIGHTS = {
    "before the step is counted": (make_usual, False),
    "weights written through .data": (make_written, True),
    "only blocks train": (make_blocks_only, True),
}


def see_after_one_step(worker: int) -> dict[str, dict[str, Tensor]]:
    run = SmallRun(Config(local_steps=5, min_blocks=3, batch_norm="running", test_scale=1.0), steps=1)
    sights = {}
    for name, (make, count) in SIGHTS.items():
        model = make_model(run)
        optimizer = make(model)
        engine = Engine(model, [optimizer], run.config)
        engine.start()
        train_step(model, optimizer, batch_of(worker, 0))
        if count:
            engine.count_step()
        with engine.full_model() as full:
            sights[name] = clone_state(full)
        engine.abandon()
    return sights


@pytest.fixture(scope="module")
def seen_after_one_step() -> list[dict[str, dict[str, Tensor]]]:
    return run_workers(see_after_one_step, 3)


@pytest.mark.parametrize(
    "name",
    [
        "before the step is counted",
        "weights written through .data",
        "only blocks train",
    ],
)
def test_whoever_wrote_the_weights_the_full_model_is_the_mean(seen_after_one_step, name):
    """A worker must not guess from its own view whether there is something to average."""
    make, _ = SIGHTS[name]
    run = SmallRun(Config(local_steps=5, min_blocks=3, batch_norm="running", test_scale=1.0), steps=1)
    simulator = Simulator(make_model(run), make, run.config, 3)
    for number, worker in enumerate(simulator.workers):
        train_step(worker.module, worker.optimizers[0], batch_of(number, 0))
    expected = simulator.full_model().state_dict()
    for worker in seen_after_one_step:
        assert_equal_states(worker[name], expected)


def observe_then_sync(worker: int, run: Run) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """At the end of each round: the full model as observed, and the worker's tensors after the sync."""
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config)
    engine.start()
    seen = []
    for step in range(run.steps):
        train_step(model, optimizer, batch_of(worker, step))
        engine.count_step()
        with engine.full_model() as full:
            state = clone_state(full)
        engine.sync_if_due()
        seen.append((state, present_state(model)))
    engine.abandon()
    return seen


def test_what_is_seen_at_the_end_of_a_round_is_what_the_sync_makes_of_it_bit_for_bit() -> None:
    """Without scale and new statistics; blocks are merged at the same owner."""
    run = SmallRun(Config(local_steps=1, min_blocks=3, batch_norm="running", test_scale=1.0), steps=3)
    for rounds in run_workers(observe_then_sync, 3, run):
        assert len(rounds) == 3
        for seen, synced in rounds:
            assert_equal_states({name: seen[name] for name in synced}, synced, exactly=True)

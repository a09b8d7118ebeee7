"""The outer optimizer in syncs of several workers, as threads; by processes: ``tests/distributed/test_oracle.py``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resist_lightning import Config, Engine
from resist_lightning.comm.collective import Collective
from resist_lightning.schedule.transfers import plan_sync
from tests.helpers.nets import Normed
from tests.helpers.threads import run_threads
from tests.helpers.training import (
    Run,
    assert_equal_states,
    batch_of,
    clone_state,
    make_model,
    make_optimizer,
    present_state,
    present_tensors,
    start_engine,
    train_engine,
    train_step,
    train_steps,
)

WORKERS, ODD = 3, 1
OUTER: dict[str, Any] = {"outer": "nesterov", "outer_rate": 0.5, "outer_momentum": 0.8}
State = dict[str, Tensor]


def state_of(collective: Collective, run: Run) -> State:
    return train_engine(collective.worker, run, collective=collective)[1]


RUNS: dict[str, dict[str, Any]] = {
    "travel, warm-up": {"min_blocks": 3, "momentum": "travel", "warmup_rounds": 1},
    "int8": {"min_blocks": 3, "wire": "int8"},
    "local SGD": {"blocks": []},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_rate_of_one_without_momentum_trains_as_without_bit_for_bit(options: dict[str, Any]) -> None:
    run = Run(Config(local_steps=2, batch_norm="running", **options), steps=7, observe_at=(2,), net=Normed)
    same = replace(run.config, outer="nesterov", outer_rate=1.0, outer_momentum=0.0)
    plain, _ = run_threads(state_of, WORKERS, run)
    stepped, _ = run_threads(state_of, WORKERS, replace(run, config=same))
    for one, other in zip(plain, stepped, strict=True):
        assert_equal_states(other, one, exactly=True)


def engine_of(collective: Collective, config: Config) -> tuple[Engine, Any]:
    return start_engine(collective, Run(config, steps=0, net=Normed))


def kept(engine: Engine) -> dict[str, dict[str, Tensor]]:
    return engine.sync.state_dict(with_full_model=False)["outer"]


def names_kept(collective: Collective, config: Config) -> list[tuple[set[str], set[str], set[str]]]:
    """After each sync: names of tensors with a velocity, with a start value, and of those that the next sync steps."""
    found = []
    engine, optimizer = engine_of(collective, config)
    for round in range(1, 5):
        train_steps(engine, optimizer, range(round - 1, round))
        plan = plan_sync(engine.layout.partition(round), engine.layout.partition(round + 1))
        mine = [*plan.averaged, *(block for block, root in plan.owner.items() if root == collective.worker)]
        names = set(engine.layout.shared).union(*(engine.layout.blocks[block].tensors() for block in mine))
        trained = {name for name, parameter in engine.module.named_parameters() if name in names}
        velocities = set(kept(engine)["velocity"])
        with torch.no_grad():
            for tensor in present_tensors(engine.module).values():
                tensor.add_(1)
        found.append((velocities, set(kept(engine)["start"]), trained))
    engine.abandon()
    return found


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_worker_keeps_what_the_step_needs_of_shared_layers_and_of_the_blocks_that_it_merges_next(warmup: int) -> None:
    config = Config(local_steps=1, min_blocks=3, warmup_rounds=warmup, non_finite="raise", **OUTER)
    for found in run_threads(names_kept, WORKERS, config)[0]:
        for velocities, starts, trained in found:
            assert velocities == starts == trained
            assert trained


def spoilt(collective: Collective, config: Config) -> dict[str, State]:
    """A worker's tensors when a round began, when it ended with NaN on one worker, and after the sync."""
    engine, optimizer = engine_of(collective, config)
    train_steps(engine, optimizer, range(2))
    began, velocity = present_state(engine.module), {n: v.clone() for n, v in kept(engine)["velocity"].items()}
    train_steps(engine, optimizer, range(2, 3))
    train_step(engine.module, optimizer, batch_of(collective.worker, 3))
    if collective.worker == ODD:
        for tensor in present_tensors(engine.module).values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    had = present_state(engine.module)
    engine.after_step()
    with engine.full_model():
        full = clone_state(engine.module)
    train_steps(engine, optimizer, range(4, 9))
    later = present_state(engine.module)
    engine.abandon()
    return {"began": began, "velocity": velocity, "had": had, "full": full, "later": later}


@pytest.mark.filterwarnings("ignore:.*Left out of this round")
@pytest.mark.parametrize("least", [1, 3])
def test_where_a_worker_is_left_out_the_others_mean_is_stepped_and_its_own_blocks_are_put_back(least: int) -> None:
    config = Config(local_steps=2, min_blocks=least, batch_norm="running", test_scale=1.0, non_finite="drop", **OUTER)
    workers, _ = run_threads(spoilt, WORKERS, config)
    alone = stepped = 0
    for name, after in workers[0]["full"].items():
        sound = [each["had"][name] for number, each in enumerate(workers) if name in each["had"] and number != ODD]
        for each in workers:
            assert torch.equal(each["full"][name], after)
        if not sound:
            alone += 1
            assert torch.equal(after, workers[ODD]["began"][name])
        elif "running" not in name and "num_batches" not in name:
            mean = torch.stack(sound).mean(0)
            velocities = [each["velocity"][name] for each in workers if name in each["velocity"]]
            change = next(each["began"][name] for each in workers if name in each["began"]) - mean
            past = 0.8 * velocities[0] + change
            expected = mean - (-0.5 * change + 0.5 * 0.8 * past)
            stepped += torch.allclose(after, expected, rtol=1e-5, atol=1e-6)
            # A block that is not merged by the planned worker is the mean, and begins without velocity.
            assert torch.allclose(after, expected, rtol=1e-5, atol=1e-6) or torch.allclose(after, mean, atol=1e-6)
    assert stepped > len(workers[0]["full"]) / 4
    assert alone > 0 or least == 3
    for each in workers:
        assert all(bool(tensor.isfinite().all()) for tensor in each["later"].values())


def unbroken_and_resumed(collective: Collective, config: Config) -> list[State]:
    """The end of a run, and of runs resumed from snapshots within a round and right after a sync."""
    engine, optimizer = engine_of(collective, config)
    saved = []
    for step in range(10):
        if step in (6, 7):
            saved.append(copy.deepcopy((step, engine.resumption.place(), engine.resumption.state_dict())))
        train_steps(engine, optimizer, range(step, step + 1))
    engine.finish()
    states = [clone_state(engine.module)]
    for stopped, place, own in saved:
        model = make_model(Run(config, steps=0, net=Normed))
        optimizer = make_optimizer(Run(config, steps=0, net=Normed), model)
        engine = Engine(model, [optimizer], config, collective=collective)
        assert engine.restore(place, own)
        assert engine.start()
        train_steps(engine, optimizer, range(stopped, 10))
        engine.finish()
        states.append(clone_state(model))
    return states


@pytest.mark.parametrize("options", [*RUNS.values(), {"min_blocks": 3, "wire": "int8", "non_finite": "drop"}])
def test_a_resumed_run_takes_the_same_outer_steps(options: dict[str, Any]) -> None:
    config = Config(local_steps=3, batch_norm="running", **options, **OUTER)
    for unbroken, *resumed in run_threads(unbroken_and_resumed, WORKERS, config)[0]:
        assert len(resumed) == 2
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)


def test_a_run_with_an_outer_optimizer_does_not_resume_within_a_round_of_one_without() -> None:
    def identity(collective: Collective, config: Config) -> dict[str, Any]:
        return engine_of(collective, config)[0].layout.identity()

    (plain, *_), _ = run_threads(identity, 1, Config(local_steps=2))
    (stepped, *_), _ = run_threads(identity, 1, Config(local_steps=2, **OUTER))
    assert plain != stepped


def saved_of(collective: Collective, config: Config) -> tuple[Any, Any, State]:
    engine, optimizer = engine_of(collective, config)
    train_steps(engine, optimizer, range(3))
    place, own = copy.deepcopy((engine.resumption.place(), engine.resumption.state_dict()))
    engine.finish()
    return place, own, clone_state(engine.module)


def resumed_by_others(collective: Collective, config: Config, saved: tuple[Any, Any, State]) -> tuple[bool, int, State]:
    """Whether the resume is exact, its number of velocities, and the full model after two more rounds."""
    place, own, weights = saved
    model = make_model(Run(config, steps=0, net=Normed))
    optimizer = make_optimizer(Run(config, steps=0, net=Normed), model)
    model.load_state_dict(weights)
    engine = Engine(model, [optimizer], config, collective=collective)
    same = engine.restore(place, own)
    engine.start()
    velocities = len(kept(engine)["velocity"])
    train_steps(engine, optimizer, range(4))
    engine.finish()
    return same, velocities, clone_state(model)


def test_another_number_of_workers_resumes_without_velocities() -> None:
    config = Config(local_steps=2, min_blocks=1, batch_norm="running", test_scale=1.0, **OUTER)
    saved = run_threads(saved_of, WORKERS, config)[0][0]
    assert saved[1]["outer"]["velocity"]
    found, _ = run_threads(resumed_by_others, 2, config, saved)
    for same, velocities, state in found:
        assert (same, velocities) == (False, 0)
        assert_equal_states(state, found[0][2], exactly=True)

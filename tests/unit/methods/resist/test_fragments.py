"""Syncs of one fragment at a time, of workers as threads; by processes: ``tests/distributed/test_oracle.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor

from resist_lightning import Config, Engine, PostLocal
from resist_lightning.comm.collective import Collective
from resist_lightning.methods.resist.layout import BlockLayout
from tests.helpers.nets import Normed
from tests.helpers.threads import run_threads
from tests.helpers.training import (
    Run,
    assert_equal_states,
    assert_threads_train_what_the_simulator_trains,
    clone_state,
    ends_of_resumed,
    make_model,
    present_state,
    start_engine,
    train_steps,
)

State = dict[str, Tensor]

OUTER: dict[str, Any] = {"outer": "nesterov", "outer_rate": 0.5, "outer_momentum": 0.8}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "blocks on several workers, travel": (3, {"min_blocks": 3, "fragments": 3, "momentum": "travel"}),
    "blocks everywhere, keep, int4": (3, {"blocks_per_worker": (4, 2, 2), "momentum": "keep", "wire": "int4"}),
    "warm-up and finish, int2": (2, {"min_blocks": 2, "warmup_rounds": 1, "finish_rounds": 2, "wire": "int2"}),
    "growth, outer": (2, {"growth": [0.5, 1], **OUTER}),
    "outer, int8, beside the training": (3, {"min_blocks": 2, "wire": "int8", "overlap": 1, **OUTER}),
    "local SGD, outer, int2": (3, {"blocks": [], "batch_norm": "running", "fragments": 4, "wire": "int2", **OUTER}),
    "rounds that grow": (2, {"min_blocks": 2, "local_steps": PostLocal(1, 3, 4)}),
}


def run_of(options: dict[str, Any], steps: int = 11) -> Run:
    return Run(Config(**{"local_steps": 2, "fragments": 2, **options}), steps=steps, net=Normed)


@pytest.mark.parametrize(("workers", "options"), RUNS.values(), ids=RUNS)
def test_workers_train_what_the_simulator_trains(workers: int, options: dict[str, Any]) -> None:
    assert_threads_train_what_the_simulator_trains(run_of(options), workers, fragments=1)


def test_a_run_that_resumes_between_the_syncs_of_its_fragments_is_the_run_that_was_not_stopped() -> None:
    options = {"min_blocks": 2, "momentum": "keep", "wire": "int8", "overlap": 1, **OUTER}
    run = run_of(options, steps=11)
    stops = (3, 6)  # while a sync is under way, and between two rounds
    for states in run_threads(ends_of_resumed, 3, run, stops, clone_state(make_model(run)))[0]:
        for stop in stops:
            assert_equal_states(states[stop], states[0], exactly=True)


def held_after_steps(collective: Collective, run: Run) -> State:
    engine, optimizer = start_engine(collective, run)
    train_steps(engine, optimizer, range(run.steps))
    held = present_state(engine.module)
    engine.abandon()
    return held


def test_a_sync_makes_its_fragment_equal_and_leaves_the_others_as_they_are() -> None:
    run = run_of({"blocks_per_worker": (4, 2)}, steps=2)
    (first, second), _ = run_threads(held_after_steps, 2, run)
    fragments = BlockLayout(make_model(run), run.config, 2).fragments
    trained = [name for name in first.keys() & second.keys() if not name.endswith("num_batches_tracked")]
    assert {fragments.covers(0, name) for name in trained} == {True, False}
    for name in trained:
        assert torch.equal(first[name], second[name]) == fragments.covers(0, name), name


def remainders_after_each_sync(collective: Collective, run: Run) -> list[set[str]]:
    """After each step, names of the tensors with a rounding remainder that is added later."""
    engine, optimizer = start_engine(collective, run)
    found = []
    for step in range(run.steps):
        train_steps(engine, optimizer, range(step, step + 1))
        found.append(set(engine.sync.state_dict(with_full_model=False).get("taken", ())))
    engine.abandon()
    return found


def test_what_rounding_took_from_a_fragment_is_kept_until_its_next_sync() -> None:
    run = run_of({"blocks": [], "batch_norm": "running", "local_steps": 1, "wire": "int2"}, steps=4)
    for first, *later in run_threads(remainders_after_each_sync, 2, run)[0]:
        assert first < later[0]
        assert later[0] == later[1] == later[2]


def test_before_an_outer_step_nothing_that_rounding_took_is_added_later() -> None:
    run = run_of({"blocks": [], "batch_norm": "running", "local_steps": 1, "wire": "int2", **OUTER}, steps=2)
    assert run_threads(remainders_after_each_sync, 2, run)[0] == [[set(), set()]] * 2


def frozen_in_between(collective: Collective, run: Run) -> State:
    """The full model, after every parameter was frozen for a while between two syncs of its fragment."""
    engine, optimizer = start_engine(collective, run)
    for step in range(run.steps):
        train_steps(engine, optimizer, range(step, step + 1))
        if step in (0, 4):
            for name, parameter in engine.module.named_parameters():
                parameter.requires_grad_(requires_grad=step == 4 or not name.startswith(("stem", "body.0")))
        if step == 3:
            with engine.full_model():
                frozen = clone_state(engine.module)
    engine.abandon()
    return frozen


@pytest.mark.parametrize("options", [{}, {"wire": "int8"}, {"overlap": 1}])
def test_what_is_frozen_before_its_fragment_is_synced_is_averaged_all_the_same(options: dict[str, Any]) -> None:
    run = run_of({"min_blocks": 2, **options}, steps=6)
    first, *others = run_threads(frozen_in_between, 3, run)[0]
    for other in others:
        assert_equal_states(other, first, exactly=True)


def with_a_new_buffer(collective: Collective, run: Run) -> State:
    engine, optimizer = start_engine(collective, run)
    for step in range(run.steps):
        train_steps(engine, optimizer, range(step, step + 1))
        if step == 0:
            engine.module.register_buffer("cache", torch.zeros(2), persistent=False)
    engine.finish()
    return clone_state(engine.module)


def test_a_buffer_that_comes_later_is_in_no_fragment() -> None:
    first, second = run_threads(with_a_new_buffer, 2, run_of({"min_blocks": 2}, steps=5))[0]
    assert_equal_states(second, first, exactly=True)


def at_a_border(collective: Collective, run: Run) -> tuple[dict[str, Any], State]:
    engine, optimizer = start_engine(collective, run)
    train_steps(engine, optimizer, range(run.steps))
    own = copy.deepcopy(engine.resumption.state_dict())
    with engine.full_model():
        full = clone_state(engine.module)
    engine.abandon()
    return own, full


@pytest.mark.parametrize("options", [{"fragments": 2}, {"fragments": 1, "overlap": 1}])
def test_snapshots_of_workers_that_differ_are_the_mean_for_others(options: dict[str, Any]) -> None:
    run = run_of({"min_blocks": 3, "batch_norm": "running", "test_scale": 1.0, **options}, steps=6)
    found = run_threads(at_a_border, 3, run)[0]
    layout = BlockLayout(make_model(run), run.config, 2)
    assert_equal_states(layout.full_tensors({"own": own} for own, _ in found), found[0][1])


def test_reset_needs_state_that_belongs_to_a_parameter() -> None:
    model = make_model(run_of({}))
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"SGDScheduleFree keeps .* for all parameters; use momentum='keep'"):
        Engine(model, [optimizer], Config(min_blocks=2, fragments=2, momentum="reset"))


def test_more_fragments_than_can_be_filled_are_refused() -> None:
    model = make_model(run_of({}))
    with pytest.raises(ValueError, match=r"fragments=3: a worker holds 2 of the 4 .* Choose fragments=2 or fewer"):
        BlockLayout(model, Config(min_blocks=2, fragments=3), 2)
    with pytest.raises(ValueError, match=r"fragments=99: this network has tensors for \d+\. Choose as many or fewer"):
        BlockLayout(model, Config(blocks=[], fragments=99), 2)

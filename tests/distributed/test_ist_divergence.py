"""IST by real processes: NaN before a sync is caught and named, and replicas are compared after one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resist_lightning import Engine, NeuronConfig, NotFinite, WorkersDisagree
from resist_lightning.methods.sync import Sync
from tests.helpers.ist import Run, batch_of, full_state, slice_of, start_engine
from tests.helpers.processes import run_workers
from tests.helpers.training import clone_state, held_tensors, train_step

WORKERS, ODD = 3, 1
CONFIG = NeuronConfig(min_share=0, local_steps=2, batch_norm="running", check="full")
BIAS = "8.bias"  # of the output layer, held by all workers


def train(engine: Engine, optimizer: Any, run: Run, worker: int, steps: int) -> None:
    for step in range(steps):
        train_step(engine.module, optimizer, batch_of(run, worker, step))
        engine.after_step()


# ------------------------------------------------------------------ after a sync


def flip_after_the_sync(engine: Engine) -> None:
    """Flip a bit of the output bias between the last message of a sync and the first local step."""
    equal = engine.sync.replicated_tensors

    def faulty(_: Sync[Any], round: int) -> dict[str, Tensor]:
        tensors = equal(round)
        tensors[BIAS].detach().view(-1)[-1:].view(torch.int8)[0] ^= 1
        return tensors

    engine.sync.replicated_tensors = faulty.__get__(engine.sync)  # type: ignore[method-assign]


def play_flip(worker: int) -> str:
    run = Run(CONFIG, 0)
    engine, optimizer = start_engine(run)
    train(engine, optimizer, run, worker, 2)  # a sync without a fault
    if worker == ODD:
        flip_after_the_sync(engine)
    train(engine, optimizer, run, worker, 3)
    try:
        with engine.full_model():
            return "nobody noticed"
    except WorkersDisagree as error:
        return str(error)
    finally:
        engine.abandon()


def test_an_output_bias_that_differs_after_a_sync_is_named_with_its_worker_at_the_next_handshake() -> None:
    for message in run_workers(play_flip, WORKERS):
        assert f"{BIAS} (worker {ODD} differs from the others). " in message
        assert "the sync into round 2, tensors" in message


# ------------------------------------------------------------------ before a sync


def sync(engine: Engine) -> None:
    engine.after_step()


def evaluate(engine: Engine) -> None:
    with engine.full_model():
        raise AssertionError("nobody noticed")


CASES: dict[str, tuple[str, float, Callable[[Engine], None], str]] = {
    "output bias": (BIAS, torch.nan, sync, f"shared tensor {BIAS}"),
    "rows": ("0.weight", -torch.inf, sync, "its neurons' part of 0.weight"),
    "inner matrix": ("3.weight", torch.nan, evaluate, "its neurons' part of 3.weight"),
    "buffer of batch norm": ("1.running_var", torch.inf, sync, "its neurons' part of 1.running_var"),
    "before the end": ("8.weight", torch.nan, Engine.finish, "its neurons' part of 8.weight"),
}


def play_spoilt(worker: int) -> dict[str, tuple[str, bool]]:
    told, run = {}, Run(CONFIG, 0)
    for case, (name, value, act, _) in CASES.items():
        engine, optimizer = start_engine(run)
        train(engine, optimizer, run, worker, 3)
        train_step(engine.module, optimizer, batch_of(run, worker, 3))
        if worker == ODD:
            with torch.no_grad():
                held_tensors(engine.module)[name].view(-1)[-1] = value
        before = clone_state(engine.module)
        try:
            act(engine)
        except NotFinite as error:
            after = clone_state(engine.module)
            same = all(torch.equal(after[key].nan_to_num(7), before[key].nan_to_num(7)) for key in before)
            told[case] = (str(error), same)
        engine.abandon()
    return told


def test_nan_and_infinity_are_caught_on_all_workers_with_worker_place_round_and_step() -> None:
    told = run_workers(play_spoilt, WORKERS)
    for case, (_, _, act, place) in CASES.items():
        for worker in told:
            message, same = worker[case]
            assert f"step {2 if act is sync else 1} of round 1: worker {ODD} in {place}." in message, case
            assert "Nothing was averaged" in message
            assert same, case


# ------------------------------------------------------------------ left out of a round

DROPS = {
    "reset": Run(replace(CONFIG, non_finite="drop"), 0),
    "keep": Run(replace(CONFIG, non_finite="drop", momentum="keep"), 0),
    "convolutions, travel, AdamW": Run(replace(CONFIG, non_finite="drop", momentum="travel"), 0, "conv", "adamw"),
}
AT_AN_EVALUATION, AT_A_SYNC = "at an evaluation", "at a sync"
State = dict[str, Tensor]


@dataclass
class Dropped:
    """Tensors of a worker, and full models.

    Attributes:
        began: the full model when the round began.
        received: the worker's tensors when the round began.
        had: the worker's tensors when the round ended.
        full: the full model afterwards, at an evaluation and at the sync.
        said: the warnings of both.
        parts: the worker's slices of ``began`` and of both full models.
        unchanged_by_evaluation: whether the worker was the same after the evaluation.
        finite_later: whether weights and state were finite two rounds later.
    """

    began: State
    received: State
    had: State
    full: dict[str, State]
    said: dict[str, list[str]]
    parts: dict[str, State]
    unchanged_by_evaluation: bool
    finite_later: bool


def play_drop(worker: int) -> dict[str, Dropped]:
    played = {}
    for case, run in DROPS.items():
        engine, optimizer = start_engine(run)
        train(engine, optimizer, run, worker, 2)
        began = full_state(engine)
        received = clone_state(engine.module)
        train(engine, optimizer, run, worker, 1)
        train_step(engine.module, optimizer, batch_of(run, worker, 1))
        if worker == ODD:
            for tensor in [*held_tensors(engine.module).values(), *slots(optimizer)]:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        had, held = clone_state(engine.module), engine.partition
        full, said = {}, {}
        full[AT_AN_EVALUATION], said[AT_AN_EVALUATION] = full_model_and_warnings(engine, lambda: None)
        back = clone_state(engine.module)
        unchanged = all(torch.equal(back[key].nan_to_num(7), had[key].nan_to_num(7)) for key in had)
        full[AT_A_SYNC], said[AT_A_SYNC] = full_model_and_warnings(engine, engine.after_step)
        train(engine, optimizer, run, worker, 4)
        finite = all(bool(t.isfinite().all()) for t in [*clone_state(engine.module).values(), *slots(optimizer)])
        parts = {
            which: {name: slice_of(engine.layout, state[name], name, held, worker) for name in engine.layout.shapes}
            for which, state in {"began": began, **full}.items()
        }
        played[case] = Dropped(began, received, had, full, said, parts, unchanged, finite)
        engine.abandon()
    return played


def slots(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of the optimizer's state."""
    found = [slot for slots in optimizer.state.values() for slot in slots.values()]
    return [slot for slot in found if isinstance(slot, Tensor)]


def full_model_and_warnings(engine: Engine, before: Callable[[], None]) -> tuple[State, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before()
        full = full_state(engine)
    return full, [str(w.message) for w in caught if "Left out" in str(w.message)]


@pytest.fixture(scope="module")
def dropped() -> list[dict[str, Dropped]]:
    return run_workers(play_drop, WORKERS)


@pytest.mark.parametrize("when", [AT_A_SYNC, AT_AN_EVALUATION])
def test_of_a_worker_that_is_left_out_the_slices_are_what_they_were_when_the_round_began(
    dropped: list[dict[str, Dropped]], when: str
) -> None:
    for case in DROPS:
        played = [worker[case] for worker in dropped]
        for number, each in enumerate(played):
            full = each.full[when]
            assert each.parts["began"]
            for name, part in each.parts[when].items():
                assert torch.equal(part, (each.received if number == ODD else each.had)[name]), (case, name)
                assert torch.equal(each.parts["began"][name], each.received[name]), (case, name)
            for name in full.keys() - each.parts[when].keys():
                values = [other.had[name] for index, other in enumerate(played) if index != ODD]
                if values[0].is_floating_point():
                    torch.testing.assert_close(full[name], sum(values) / len(values))
                else:
                    assert torch.equal(full[name], torch.stack(values).max(0).values)
            assert any(not torch.equal(each.began[name], full[name]) for name in full)
            assert len(each.said[when]) == (1 if number == 0 else 0)


def test_an_evaluation_leaves_the_worker_that_is_left_out_as_it_is_and_after_the_sync_the_training_goes_on(
    dropped: list[dict[str, Dropped]],
) -> None:
    for worker in dropped:
        for case, played in worker.items():
            assert played.unchanged_by_evaluation, case
            assert played.finite_later, case

"""IST by real processes: NaN before a sync is caught and named, and replicas are compared after one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resist_lightning import Engine, NeuronConfig, NotFinite, WorkersDisagree
from resist_lightning.methods.sync import Sync
from tests.helpers.ist import Run, batch_of, slice_of, start_engine
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
    "travel, AdamW": Run(replace(CONFIG, non_finite="drop", momentum="travel"), 0, optimizer="adamw"),
    "convolutions, travel": Run(replace(CONFIG, non_finite="drop", momentum="travel"), 0, "conv"),
}


def play_drop(worker: int, seen: bool) -> dict[str, Any]:
    """For each case: the full model when the round began, the worker's tensors when it ended, the full model after."""
    played = {}
    for case, run in DROPS.items():
        engine, optimizer = start_engine(run)
        train(engine, optimizer, run, worker, 2)
        with engine.full_model():
            began = clone_state(engine.module)
        received = clone_state(engine.module)
        train(engine, optimizer, run, worker, 1)
        train_step(engine.module, optimizer, batch_of(run, worker, 1))
        if worker == ODD:
            states = [slot for slots in optimizer.state.values() for slot in slots.values()]
            for tensor in [*held_tensors(engine.module).values(), *states]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        had, held = clone_state(engine.module), engine.partition
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not seen:
                engine.after_step()
            with engine.full_model():
                full = clone_state(engine.module)
        if seen:
            back = clone_state(engine.module)
            fine = all(torch.equal(back[key].nan_to_num(7), had[key].nan_to_num(7)) for key in had)
        else:
            train(engine, optimizer, run, worker, 4)
            tensors = [slot for slots in optimizer.state.values() for slot in slots.values()]
            tensors += clone_state(engine.module).values()
            fine = all(bool(tensor.isfinite().all()) for tensor in tensors)
        said = [str(w.message) for w in caught if "Left out" in str(w.message)]
        names = [name for name in engine.layout.shapes if name in full]
        slices = {
            which: {name: slice_of(engine.layout, state[name], name, held, worker) for name in names}
            for which, state in (("began", began), ("full", full))
        }
        played[case] = (began, received, had, full, said, fine, slices)
        engine.abandon()
    return played


@pytest.mark.parametrize("seen", [False, True], ids=["at a sync", "at an evaluation"])
def test_of_a_worker_that_is_left_out_the_slices_are_what_they_were_when_the_round_began(seen: bool) -> None:
    workers = run_workers(play_drop, WORKERS, seen)
    for case in DROPS:
        played = [worker[case] for worker in workers]
        for number, (began, received, had, full, said, fine, slices) in enumerate(played):
            assert slices["began"]
            for name, part in slices["full"].items():
                assert torch.equal(part, received[name] if number == ODD else had[name]), (case, name)
                assert torch.equal(slices["began"][name], received[name]), (case, name)
            for name in full.keys() - slices["full"].keys():
                values = [had[name] for other, (_, _, had, *_) in enumerate(played) if other != ODD]
                if values[0].is_floating_point():
                    torch.testing.assert_close(full[name], sum(values) / len(values))
                else:
                    assert torch.equal(full[name], torch.stack(values).max(0).values)
            assert any(not torch.equal(began[name], full[name]) for name in full)
            assert fine, case
            assert len(said) == (1 if number == 0 else 0) or seen

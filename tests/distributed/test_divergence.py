"""No silent divergence: unequal tensors after a sync are named, and NaN before one is caught."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config, Engine, NotFinite, WorkersDisagree
from tests.helpers.nets import LinearBlock, Normed
from tests.helpers.processes import run_workers
from tests.helpers.training import (
    Run,
    batch_of,
    clone_state,
    make_model,
    make_optimizer,
    present_state,
    present_tensors,
    train_step,
)

WORKERS, ODD = 3, 1
RESIST = Config(local_steps=2, min_blocks=1, batch_norm="running", test_scale=1.0)
OVERLAP = Config(local_steps=2, min_blocks=3, batch_norm="running", test_scale=1.0)


def engine_for(config: Config, change: Callable[[nn.Module], None] = lambda _: None) -> tuple[Engine, Any]:
    run = Run(config, steps=0, net=Normed)
    model = make_model(run)
    change(model)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], config)
    engine.start()
    return engine, optimizer


def train(engine: Engine, optimizer: Any, worker: int, steps: int) -> None:
    for step in range(steps):
        train_step(engine.module, optimizer, batch_of(worker, step))
        engine.after_step()


def present(engine: Engine) -> dict[str, Tensor]:
    return present_state(engine.module)


# ------------------------------------------------------------------ after a sync


def flip_after_the_sync(engine: Engine, name: str) -> None:
    """Flip a bit between the last message of a sync and the first local step."""
    finish = engine.sync.replicated_tensors

    def faulty(round: int) -> dict[str, Tensor]:
        tensors = finish(round)
        tensors[name].detach().view(-1)[-1:].view(torch.int8)[0] ^= 1
        return tensors

    engine.sync.replicated_tensors = faulty  # type: ignore[method-assign]


FLIPS = {
    "parameter": (RESIST, "head.weight"),
    "buffer of batch norm": (RESIST, "body.0.norm.running_var"),
    "counter": (RESIST, "body.0.norm.num_batches_tracked"),
    "full": (Config(local_steps=2, min_blocks=1, check="full"), "body.0.out.weight"),
    "fewer bits": (Config(local_steps=2, min_blocks=1, wire="int8"), "head.weight"),
    "block that all hold": (Config(local_steps=2, min_blocks=4), "body.2.out.weight"),
}


def play_flips(worker: int) -> dict[str, list[str]]:
    told: dict[str, list[str]] = {}
    for case, (config, name) in FLIPS.items():
        engine, optimizer = engine_for(config)
        train(engine, optimizer, worker, 2)  # a sync without a fault
        if worker == ODD:
            flip_after_the_sync(engine, name)
        train(engine, optimizer, worker, 3)
        try:
            with engine.full_model():  # the next handshake, in the middle of a round
                told[case] = ["nobody noticed"]
        except WorkersDisagree as error:
            told[case] = [str(error)]
        engine.abandon()
    return told


def test_a_bit_that_differs_after_a_sync_is_found_at_the_next_handshake_and_its_tensor_and_worker_are_named():
    told = run_workers(play_flips, WORKERS)
    for case, (_, name) in FLIPS.items():
        for worker in told:
            (message,) = worker[case]
            assert f"{name} (worker {ODD} differs from the others). " in message, case
            assert "the sync into round 2, tensors" in message, case


def play_unchecked(worker: int) -> str:
    engine, optimizer = engine_for(Config(local_steps=2, min_blocks=1, check="off"))
    if worker == ODD:
        flip_after_the_sync(engine, "head.weight")
    train(engine, optimizer, worker, 5)
    engine.abandon()
    return "went on"


def test_without_the_check_nothing_is_said():
    assert run_workers(play_unchecked, 2) == ["went on"] * 2


# ------------------------------------------------------------------ before a sync


def spoil(engine: Engine, name: str, value: float = torch.nan) -> None:
    with torch.no_grad():
        present_tensors(engine.module)[name].view(-1)[-1] = value


def block_of(engine: Engine) -> str:
    return f"{engine.layout.blocks[engine.partition.held[ODD][0]].name}.out.weight"


def sync(engine: Engine) -> None:
    engine.after_step()


def evaluate(engine: Engine) -> None:
    with engine.full_model():
        raise AssertionError("nobody noticed")


CASES: dict[str, tuple[Callable[[Engine], str], float, Callable[[Engine], None]]] = {
    "shared parameter": (lambda _: "head.bias", torch.nan, sync),
    "infinity": (lambda _: "head.bias", -torch.inf, sync),
    "buffer of batch norm": (lambda _: "body.0.norm.running_var", torch.inf, sync),
    "block": (block_of, torch.nan, sync),
    "before an evaluation": (block_of, torch.nan, evaluate),
    "before the end": (lambda _: "stem.weight", torch.nan, Engine.finish),
}


def play_spoilt(worker: int) -> dict[str, tuple[str, str, bool]]:
    told = {}
    for case, (choose, value, act) in CASES.items():
        engine, optimizer = engine_for(RESIST)
        train(engine, optimizer, worker, 3)
        train_step(engine.module, optimizer, batch_of(worker, 3))
        name = choose(engine)
        if worker == ODD:
            spoil(engine, name, value)
        before = present(engine)
        try:
            act(engine)
        except NotFinite as error:
            after = present(engine)
            same = after.keys() == before.keys() and all(
                torch.equal(after[key].nan_to_num(7), before[key].nan_to_num(7)) for key in before
            )
            told[case] = (name, str(error), same)
        engine.abandon()
    return told


def test_nan_and_infinity_are_caught_on_all_workers_with_worker_place_round_and_step():
    told = run_workers(play_spoilt, WORKERS)
    for case, (_, _, act) in CASES.items():
        for worker in told:
            name, message, same = worker[case]
            block = name.rpartition(".out")[0]
            place = f"block {block} ({name})" if name.endswith("out.weight") else f"shared tensor {name}"
            assert f"step {2 if act is sync else 1} of round 1: worker {ODD} in {place}." in message, case
            assert "Nothing was averaged" in message
            assert same, case


MASK = [0.0, -torch.inf, torch.finfo(torch.float32).min]
# In all rounds each of these holds every block; the last one in turn sends a part.
MASKED = {
    "resist": RESIST,
    "blocks with two holders": replace(RESIST, min_blocks=4),
    "overlap": replace(OVERLAP, overlap=1),
    "outer, fragments": replace(OVERLAP, outer="nesterov", fragments=2),
}


def add_masks(model: nn.Module) -> None:
    for module in (model, *model.modules()):
        if module is model or isinstance(module, LinearBlock):
            module.register_buffer("mask", torch.tensor(MASK))


def play_masks(worker: int) -> dict[str, list[list[float]]]:
    played = {}
    for case, config in MASKED.items():
        engine, optimizer = engine_for(config, add_masks)
        train(engine, optimizer, worker, 7)
        engine.finish()
        played[case] = [buffer.tolist() for name, buffer in engine.module.named_buffers() if name.endswith("mask")]
    return played


def test_masks_stay_as_they_are_where_a_sum_of_them_would_not_be_finite():
    for played in run_workers(play_masks, 2):
        assert played.keys() == MASKED.keys()
        for masks in played.values():
            assert len(masks) > 3
            assert masks == [MASK] * len(masks)


# ------------------------------------------------------------------ left out of a round

DROPS = {
    "local SGD": Config(local_steps=2, blocks=[], batch_norm="running"),
    "blocks held once": RESIST,
    "overlap, travel": replace(OVERLAP, momentum="travel"),
    "all hold all, keep, fewer bits": replace(OVERLAP, min_blocks=4, momentum="keep", wire="bf16"),
}
AT_AN_EVALUATION, AT_A_SYNC = "at an evaluation", "at a sync"
State = dict[str, Tensor]


@dataclass
class Dropped:
    """A worker's tensors when the round began and ended; full models and warnings, at an evaluation and at the sync."""

    received: State
    had: State
    full: dict[str, State]
    said: dict[str, list[str]]
    unchanged_by_evaluation: bool
    finite_later: bool


def play_drop(worker: int) -> dict[str, Dropped]:
    played = {}
    for case, config in DROPS.items():
        engine, optimizer = engine_for(replace(config, non_finite="drop"))
        train(engine, optimizer, worker, 2)
        received = present(engine)
        train(engine, optimizer, worker, 1)
        train_step(engine.module, optimizer, batch_of(worker, 1))
        if worker == ODD:
            for tensor in present_tensors(engine.module).values():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
            for state in optimizer.state.values():
                state["momentum_buffer"].fill_(torch.nan)
        had = present(engine)
        full, said = {}, {}
        full[AT_AN_EVALUATION], said[AT_AN_EVALUATION] = full_model_and_warnings(engine, lambda: None)
        back = present(engine)
        unchanged = all(torch.equal(back[k].nan_to_num(7), had[k].nan_to_num(7)) for k in had)
        full[AT_A_SYNC], said[AT_A_SYNC] = full_model_and_warnings(engine, engine.after_step)
        train(engine, optimizer, worker, 3)
        finite = all(bool(t.isfinite().all()) for t in present(engine).values())
        played[case] = Dropped(received, had, full, said, unchanged, finite)
        engine.abandon()
    return played


def full_model_and_warnings(engine: Engine, before: Callable[[], None]) -> tuple[State, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before()
        with engine.full_model():
            full = clone_state(engine.module)
    return full, [str(w.message) for w in caught if "Left out" in str(w.message)]


@pytest.fixture(scope="module")
def dropped() -> list[dict[str, Dropped]]:
    return run_workers(play_drop, WORKERS)


@pytest.mark.parametrize("when", [AT_A_SYNC, AT_AN_EVALUATION])
def test_a_worker_that_is_left_out_gets_the_mean_of_the_others_and_its_own_blocks_as_it_received_them(dropped, when):
    alone = 0
    for case in DROPS:
        played = [worker[case] for worker in dropped]
        assert played[0].full[when]
        for name, full in played[0].full[when].items():
            values = [each.had[name] for number, each in enumerate(played) if name in each.had and number != ODD]
            if not values:
                alone += 1
                expected = played[ODD].received[name]
            elif values[0].is_floating_point():
                expected = sum(values[1:], values[0]) / len(values)
            else:
                expected = torch.stack(values).max(0).values
            tolerance = 1e-6
            if "fewer bits" in case and when == AT_A_SYNC:  # it rounds values of blocks and changes of shared tensors
                moved = (expected - played[0].received.get(name, expected)).abs().max().item()
                tolerance = 0.02 if name.startswith("body") else 0.02 * moved + 1e-6
            assert torch.allclose(full.double(), expected.double(), rtol=1e-6, atol=tolerance), (case, name)
            for each in played:
                assert torch.equal(each.full[when][name], full)
        assert [bool(each.said[when]) for each in played] == [True, False, False], case
        assert f"worker {ODD} in " in played[0].said[when][0]
    assert alone > 0


def test_an_evaluation_leaves_the_worker_that_is_left_out_as_it_is_and_after_the_sync_the_training_goes_on(dropped):
    for worker in dropped:
        for case, played in worker.items():
            assert played.unchanged_by_evaluation, case
            assert played.finite_later, case


def play_all_bad(worker: int) -> str:
    engine, optimizer = engine_for(replace(RESIST, non_finite="drop"))
    train(engine, optimizer, worker, 1)
    spoil(engine, "head.bias")
    with pytest.raises(NotFinite) as caught:
        engine.after_step()
    engine.abandon()
    return str(caught.value)


def test_if_all_workers_have_nan_nobody_is_left_to_take_the_mean_of():
    for message in run_workers(play_all_bad, 2):
        assert "all workers have NaN or infinity after local step 2 of round 0" in message

"""Contract 12: workers that come to a sync in different states all get an error, at once, and mix nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning import QSR, Config, Engine, WorkersDisagree
from tests.helpers.nets import small_preact
from tests.helpers.processes import run_workers, run_workers_to_the_end
from tests.helpers.training import present_state, present_tensors

ODD = 1
BASE = Config(local_steps=2, min_blocks=1)


def engine_for(config: Config = BASE, change: Callable[[nn.Module], None] | None = None, lr: float = 0.1) -> Engine:
    model = small_preact()
    if change is not None:
        change(model)
    return Engine(model, [torch.optim.SGD(model.parameters(), lr, momentum=0.9)], config)


def until(steps: int) -> Engine:
    model = small_preact()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Engine(model, [optimizer], Config(local_steps=2, min_blocks=1, finish_rounds=2), total_steps=steps)


def fill(engine: Engine, worker: int) -> dict[str, torch.Tensor]:
    """Give the worker weights of its own; returns a copy of them."""
    with torch.no_grad():
        for tensor in present_tensors(engine.module).values():
            tensor.fill_(worker + 1)
    return present_state(engine.module)


def starts_with(worker: int, odd: Callable[[], Engine]) -> tuple[Engine, Callable[[], None]]:
    engine = odd() if worker == ODD else engine_for()
    return engine, engine.start


def steps_then(worker: int, steps: int, last: Callable[[Engine], None]) -> tuple[Engine, Callable[[], None]]:
    engine = engine_for()
    engine.start()
    for _ in range(steps):
        engine.count_step()
    return engine, lambda: last(engine)


def evaluate(engine: Engine) -> None:
    with engine.full_model():
        raise AssertionError("the workers did not notice")


def checkpoint(engine: Engine) -> None:
    with engine.full_model("checkpoint"):
        raise AssertionError("the workers did not notice")


def a_round_ahead(worker: int) -> tuple[Engine, Callable[[], None]]:
    engine, act = steps_then(worker, 2, Engine.sync_if_due)
    if worker == ODD:
        engine.clock.round += 1
    return engine, act


def follows_another_rate(worker: int) -> tuple[Engine, Callable[[], None]]:
    engine = engine_for(Config(local_steps=QSR(1, 0.1), min_blocks=1))
    engine.start()
    engine.count_step()
    if worker == ODD:  # its next round would have a hundred steps, and no worker would wait at its end
        engine.states.optimizers[0].param_groups[0].update(lr=0.01)
    return engine, engine.sync_if_due


def another_version(worker: int) -> tuple[Engine, Callable[[], None]]:
    engine = engine_for()

    def start() -> None:
        before = torch.__version__
        torch.__version__ = "1.0.0" if worker == ODD else before
        try:
            engine.start()
        finally:
            torch.__version__ = before

    return engine, start


def froze_a_layer(worker: int) -> tuple[Engine, Callable[[], None]]:
    engine, act = steps_then(worker, 2, Engine.sync_if_due)
    if worker == ODD:
        engine.module.head.requires_grad_(False)
    return engine, act


def widen(model: nn.Module) -> None:
    model.head = nn.Linear(model.head.in_features, 9)


SCENES: dict[str, tuple[str, Callable[[int], tuple[Engine, Callable[[], None]]]]] = {
    "another model": (
        "head.weight: worker 0 (4, 32) float32 requires_grad, worker 1 (9, 32)",
        lambda w: starts_with(w, lambda: engine_for(change=widen)),
    ),
    "another data type": ("and 81 more tensors", lambda w: starts_with(w, lambda: engine_for(change=nn.Module.double))),
    "another seed": (
        "\n  seed: worker 0 0, worker 1 1, worker 2 0\n",
        lambda w: starts_with(w, lambda: engine_for(Config(local_steps=2, min_blocks=1, seed=1))),
    ),
    "other local steps": (
        "local_steps: worker 0 2, worker 1 3, worker 2 2",
        lambda w: starts_with(w, lambda: engine_for(Config(local_steps=3, min_blocks=1))),
    ),
    "another policy": (
        "momentum: worker 0 reset, worker 1 keep, worker 2 reset",
        lambda w: starts_with(w, lambda: engine_for(Config(local_steps=2, min_blocks=1, momentum="keep"))),
    ),
    "another choice of blocks": (
        "blocks: only workers 0 and 2 have section3.1\n",
        lambda w: starts_with(w, lambda: engine_for(Config(local_steps=2, min_blocks=1, blocks="section3.[234]"))),
    ),
    "another learning rate": (
        "lr of optimizer 0, group 0: worker 0 0.1, worker 1 0.3, worker 2 0.1",
        lambda w: starts_with(w, lambda: engine_for(lr=0.3)),
    ),
    "another number of steps": (
        "total_steps: worker 0 20, worker 1 21, worker 2 20",
        lambda worker: (engine := until(20 + (worker == ODD)), engine.start),
    ),
    "another version of torch": ("torch: worker 0 ", another_version),
    "a layer frozen from the start": (
        "head.bias: worker 0 (4,) float32 requires_grad, worker 1 (4,) float32 frozen",
        (lambda w: starts_with(w, lambda: engine_for(change=lambda model: model.head.requires_grad_(False)))),
    ),
    "resumed elsewhere": ("round", a_round_ahead),
    "out of data early": (
        "purpose",
        lambda w: steps_then(w, 1 + (w != ODD), Engine.finish if w == ODD else Engine.sync_if_due),
    ),
    "skipped a batch": ("step", lambda w: steps_then(w, int(w != ODD), Engine.finish)),
    "validates alone": ("purpose", lambda w: steps_then(w, 2, evaluate if w == ODD else Engine.sync_if_due)),
    "saves while others validate": ("purpose", lambda w: steps_then(w, 1, checkpoint if w == ODD else evaluate)),
    "talks of something else": ("purpose", lambda w: steps_then(w, 2, Engine.meet if w == ODD else Engine.sync_if_due)),
    "follows another rate": ("round_steps", follows_another_rate),
    "froze a layer": ("layout", froze_a_layer),
}


SYNC_AGAINST_OBSERVATION = ("out of data early", "validates alone")


def play(worker: int, names: list[str]) -> dict[str, Any]:
    """Play all scenes in one group, which an error in a header leaves usable."""
    told = {}
    for name in names:
        engine, act = SCENES[name][1](worker)
        before = fill(engine, worker)
        clock = (engine.clock.round, engine.clock.step)
        begun = time.monotonic()
        try:
            act()
        except WorkersDisagree as error:
            after = present_tensors(engine.module)
            kept = list(after) == list(before)
            same = kept and all(torch.equal(after[key], value) for key, value in before.items())
            at = (engine.clock.round, engine.clock.step) == clock
            told[name] = (str(error), same and at, time.monotonic() - begun)
        engine.abandon()
    return told


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in SCENES if name not in SYNC_AGAINST_OBSERVATION], id="other scenes"),
        pytest.param(
            SYNC_AGAINST_OBSERVATION,
            id="a sync against an observation",
        ),
    ],
)
def test_every_disagreement_is_told_to_all_workers_at_once_and_nothing_is_mixed(names):
    told = run_workers(play, 3, names)
    for name in names:
        said = SCENES[name][0]
        assert all(name in worker for worker in told), f"{name}: somebody did not notice"
        message = told[0][name][0]
        said = said if ":" in said or "more" in said else f"({said}: worker 0"  # from a header, or from a start
        assert said in message, (name, message)
        assert "No weights were mixed" in message
        for worker in told:
            assert worker[name][0] == message
            assert worker[name][1], f"{name}: weights, blocks or clock changed"
            assert worker[name][2] < 20, f"{name}: took {worker[name][2]:.1f} s"


def start_with_a_buffer_more(worker: int) -> None:
    def add(model: nn.Module) -> None:
        model.register_buffer("mean", torch.zeros(7))

    engine_for(change=add if worker == ODD else None).start()


def test_models_that_differ_in_a_buffer_are_told_apart_too():
    outcomes = run_workers_to_the_end(start_with_a_buffer_more, 2, collective_timeout=5)
    assert [type(outcome.error) for outcome in outcomes] == [WorkersDisagree, WorkersDisagree]

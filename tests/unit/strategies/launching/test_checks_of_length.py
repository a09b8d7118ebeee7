"""Warnings of a training that is too short for its rounds, before it starts and at its end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from resist_lightning import Config
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import QSR, PostLocal
from resist_lightning.strategies.launching.checks import (
    warn_of_batches_without_step,
    warn_of_early_end,
    warn_of_short_training,
)


@contextmanager
def warned_once(message: str | None) -> Iterator[None]:
    """Inside, there is one warning, which matches; none at all for None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(each.message) for each in caught]
    assert len(texts) == (message is not None), texts
    assert re.search(message or "", "".join(texts))


def all_have_an_effect(clock: Clock, steps: int) -> list[str]:
    return []


@pytest.mark.parametrize(
    ("steps", "done", "warned"),
    [(48, 0, True), (50, 0, False), (90, 50, True), (80, 40, False)],
)
def test_a_training_that_is_shorter_than_a_round_is_told_before_it_starts(
    steps: float, done: int, warned: bool
) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, global_step=done)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_short_training(trainer, Clock(50, *divmod(done, 50)), all_have_an_effect)
    assert [f"{steps - done} local steps, and a round has local_steps=50" in str(w.message) for w in caught] == (
        [True] if warned else []
    )


def test_a_training_of_unknown_length_is_not_warned_of() -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=float("inf"), global_step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in (50, PostLocal(1, 5, 100)):
            warn_of_short_training(trainer, Clock.by(rule, lambda: None), without_effect)


def without_effect(clock: Clock, steps: int) -> list[str]:
    return ["", f"nothing at {clock.total_steps} of {steps}"]


@pytest.mark.parametrize(("clock", "alone"), [(Clock(50, 1), True), (Clock(200), False)])
def test_settings_without_effect_are_told_one_by_one(clock: Clock, alone: bool) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=150, global_step=0)
    with pytest.warns(match="nothing at 0 of 150") as caught:
        warn_of_short_training(trainer, clock, without_effect, alone=alone)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("rule", "steps", "message"),
    [
        (QSR(4, 0.1), 200, "200 local steps, and a round has 10000 by local_steps=QSR.*by the warmup_steps of QSR"),
        (QSR(4, 0.1, warmup_steps=200), 200, "warmup_steps cover all 200 local steps"),
        (PostLocal(300, 5, 400), 200, r"200 local steps, and a round has 300 by local_steps=PostLocal\(first=300"),
        (PostLocal(5, 300, 200), 200, "switch_step lies after the end of this training of 200 local steps"),
        (PostLocal(5, 300, 100), 200, None),
        (QSR(4, 0.01), 200, None),
    ],
)
def test_rounds_of_changing_length_are_judged_by_the_first(rule: Any, steps: int, message: str | None) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, global_step=0)
    with warned_once(message):
        warn_of_short_training(trainer, Clock.by(rule, lambda: 0.001), all_have_an_effect)


# The length of a training is an estimate: a local step for every batch, or for every few.


def planned(total: int | None, steps: int, max_steps: int, by_hand: bool, accumulated: int = 1) -> tuple[Any, Any]:
    """A trainer that expects as many steps, or 96, and an engine whose rounds have three of the steps planned."""
    clock = Clock(3)
    for _ in range(steps):
        if clock.due:
            clock.next_round()
        clock.tick()
    module = SimpleNamespace(automatic_optimization=not by_hand)
    trainer = SimpleNamespace(
        estimated_stepping_batches=96 if total is None else total,
        max_steps=max_steps,
        accumulate_grad_batches=accumulated,
        lightning_module=module,
    )
    config = Config(local_steps=3, finish_rounds=0 if total is None else 1)
    return trainer, SimpleNamespace(config=config, clock=clock, layout=SimpleNamespace(total_steps=total))


@pytest.mark.parametrize(
    ("total", "max_steps", "by_hand", "accumulated", "batches", "way_out"),
    [
        (96, -1, True, 1, 1, r"for every batch.* in the last one: .* Set max_steps to the number of steps"),
        (96, -1, False, 1, 1, r"Use accumulate_grad_batches"),
        (24, 24, False, 1, 1, r"Use accumulate_grad_batches"),  # max_steps counts the calls of the hook then
        (24, -1, False, 4, 4, r"for every 4 batches.* in the last 4: .* Use accumulate_grad_batches"),
        (24, 24, True, 1, 1, None),
        (24, -1, False, 4, 3, None),
        (96, -1, True, 1, 0, None),
        (None, -1, True, 1, 1, None),
    ],
)
def test_batches_without_a_step_are_told_where_the_end_is_planned_by_batches(
    total: int | None, max_steps: int, by_hand: bool, accumulated: int, batches: int, way_out: str | None
) -> None:
    """The last rounds never came, in silence, where gradients were added up by hand."""
    trainer, engine = planned(total, 0, max_steps, by_hand, accumulated)
    with warned_once(f"finish_rounds=1 is planned for {total} .*{way_out}" if way_out else None):
        assert warn_of_batches_without_step(trainer, engine, batches) == (way_out is not None)


@pytest.mark.parametrize(
    ("total", "steps", "max_steps", "message"),
    [
        (96, 24, -1, r"planned for 96 local steps, .* ended after 24: of 32 rounds the last 24 did not come"),
        (24, 12, 24, r"planned for 24 local steps, .* ended after 12: of 8 rounds the last 4 did not come"),
        (96, 93, -1, r"of 32 rounds the last 1 did not come"),
        (None, 2, -1, r"2 local steps, and a round has local_steps=3: the workers will average only once"),
        (96, 94, -1, None),
        (96, 96, -1, None),
        (96, 4, 4, None),  # a search for the learning rate
        (None, 24, -1, None),
    ],
)
def test_rounds_that_were_planned_and_did_not_come_are_told_at_the_end(
    total: int | None, steps: int, max_steps: int, message: str | None
) -> None:
    trainer, engine = planned(total, steps, max_steps, by_hand=True)
    with warned_once(message):
        warn_of_early_end(trainer, engine)

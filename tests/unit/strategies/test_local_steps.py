from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resist_lightning.strategies import local_steps
from resist_lightning.strategies.local_steps import LocalSteps, take_step


class Engine:
    """A stub for the real engine."""

    def __init__(self, *, trains_alone: bool = True, observing: bool = False) -> None:
        self.running, self.observing = True, observing
        self.config = SimpleNamespace(trains_alone=trains_alone)
        self.steps = 0

    def count_step(self) -> None:
        self.steps += 1


def test_several_optimizer_steps_in_a_batch_are_one_local_step() -> None:
    steps, engine = LocalSteps(), Engine()
    for _ in range(2):
        steps.begin_batch()
        for _ in range(3):
            steps.count(engine)  # type: ignore[arg-type]
    assert engine.steps == 2


def test_a_step_in_a_validation_is_not_taken_for_one_of_the_last_batch() -> None:
    """The engine refuses it: put back afterwards, the weights would lose it, and optimizer state would keep it."""
    steps, engine = LocalSteps(), Engine()
    steps.begin_batch()
    for engine.observing in (False, True):
        steps.count(engine)  # type: ignore[arg-type]
    assert engine.steps == 2


def test_batches_in_a_row_without_a_step_are_counted() -> None:
    steps, idle = LocalSteps(), []
    for stepped in (False, False, True, False):
        steps.begin_batch()
        idle.append(steps.idle)
        if stepped:
            steps.count(Engine())  # type: ignore[arg-type]
    steps.begin_batch()
    idle.append(steps.idle)
    steps.begin_training()
    steps.begin_batch()
    assert [*idle, steps.idle] == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("explained", "alone", "warned"),
    [(False, True, 1), (True, True, 0), (False, False, 0)],
    ids=["", "known", "stages"],
)
def test_messages_around_the_strategy_are_told_once(
    explained: bool, alone: bool, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, sent = LocalSteps(), iter(range(100))
    monkeypatch.setattr(local_steps, "messages_sent", lambda: next(sent))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            steps.begin_batch()
            if explained:
                steps.explain_message()
            steps.count(Engine(trains_alone=alone))  # type: ignore[arg-type]
    assert ["something sends messages" in str(each.message) for each in caught] == [True] * warned


def test_gathering_is_as_usual_in_a_validation() -> None:
    steps = LocalSteps()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps.note_gathering(None, with_gradients=False)
        steps.note_gathering(Engine(observing=True), with_gradients=False)  # type: ignore[arg-type]
        assert not caught
        steps.note_gathering(Engine(), with_gradients=True)  # type: ignore[arg-type]
    assert "sync_grads=True" in str(caught[0].message)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("automatic", [False, True])
def test_a_gradient_scaler_does_not_see_an_optimizer_without_gradients(absent: bool, automatic: bool) -> None:
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=object()),
        lightning_module=SimpleNamespace(automatic_optimization=automatic),
    )
    parameter = torch.nn.Parameter(torch.ones(1, device="meta" if absent else "cpu"))
    stepped, called = [], []

    def step(optimizer: Any, closure: Any) -> Any:
        stepped.append(optimizer)
        return closure()

    output = take_step(trainer, step, torch.optim.SGD([parameter], 1.0), lambda: called.append(1) or "loss")

    assert output == "loss"
    assert len(called) == 1
    assert len(stepped) == (0 if absent and not automatic else 1)

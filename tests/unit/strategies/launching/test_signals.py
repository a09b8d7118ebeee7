from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from resist_lightning.strategies.launching import signals as module
from resist_lightning.strategies.launching.signals import Signals


@pytest.fixture
def signals(trainer_with: Callable[..., L.Trainer]) -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made = Signals(trainer_with("auto", devices=1))
    made.install()
    yield made
    made._noted = 0
    made.remove()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_is_noted_said_once_and_acted_upon_when_all_know_it(signals: Signals, capfd: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # from the terminal and from torchrun: the same
    assert capfd.readouterr().err.count("worker 0: SIGTERM: all workers stop when this round ends.") == 1
    signals.act()
    assert not signals.acting

    signals.on_requests([0, signals.requests])
    with pytest.raises(SIGTERMException):
        signals.act()
    assert signals.acting


def test_a_signal_to_a_member_is_said_by_worker_and_rank(
    trainer_with: Callable[..., L.Trainer], capfd: pytest.CaptureFixture[str]
) -> None:
    Signals(trainer_with("auto", devices=1), members=2).on_requests([0, 0, 0, 1])
    assert "worker 1 (rank 3): SIGTERM: all workers stop" in capfd.readouterr().err


def test_all_workers_act_upon_the_same_signal_if_there_are_two(signals: Signals) -> None:
    signals.on_requests([2])
    with pytest.raises(KeyboardInterrupt):
        signals.act()
    signals.on_requests([2, 1])
    with pytest.raises(SIGTERMException):
        signals.act()


def test_where_a_run_may_not_end_requests_to_end_wait(signals: Signals) -> None:
    signals.on_requests([1])
    signals.act(may_end=False)
    assert signals.ending
    assert not signals.acting
    with pytest.raises(SIGTERMException):
        signals.act()


def test_a_second_signal_ends_at_once(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAME_SECONDS", -1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SIGTERMException):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_came_too_late_is_given_to_the_handler_that_was_there(signals: Signals) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signals.remove()


def test_what_reached_another_worker_is_said_once_too_however_often_it_is_learnt(signals: Signals, capfd: Any) -> None:
    for _ in range(2):
        signals.on_requests([0, 2, 2])
        with pytest.raises(KeyboardInterrupt):
            signals.act()
    assert capfd.readouterr().err.count("worker 1: SIGINT: all workers stop when this round ends.") == 1

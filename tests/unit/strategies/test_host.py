"""What Lightning's side tells the engine, and learns from the other workers."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resist_lightning.strategies.host import LightningHost


def scaler(scale: float) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=scale)
    made.scale(torch.ones(()))  # it makes its state in the first use
    return made


class Requests:
    """In the place of ``Signals``."""

    def __init__(self, requests: int = 0) -> None:
        self.requests = requests
        self.learnt: list[int] = []

    def learn(self, requests: Iterable[int]) -> None:
        self.learnt += requests


def host_with(scaler: Any = None, *, stop: bool = False, signals: Any = None) -> LightningHost:
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), should_stop=stop)
    return LightningHost(trainer, signals or Requests())


def test_only_what_a_program_asks_for_is_compared_and_signals_are_told() -> None:
    signals = Requests(3)
    host = host_with(signals=signals)
    assert [host.stop_flag(), host_with(stop=True).stop_flag()] == [0, 1]
    assert host.report() == [0.0, 3.0]

    host.learn([[0.0, 3.0], [0.0, 0.0]])

    assert signals.learnt == [3, 0]


@pytest.mark.parametrize(("mine", "others", "agreed"), [(1024.0, [512.0], 512.0), (256.0, [512.0, 1024.0], 256.0)])
def test_the_smallest_loss_scale_is_taken(mine: float, others: list[float], agreed: float) -> None:
    own = scaler(mine)
    host = host_with(own)
    assert host.report() == [mine, 0.0]

    host.learn([[mine, 0.0], *([other, 0.0] for other in others)])

    assert own.get_scale() == agreed


def test_without_a_scaler_nothing_is_agreed_upon() -> None:
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    own = scaler(1024.0)
    without: Any = LightningHost(SimpleNamespace(precision_plugin=None), Requests())  # type: ignore[arg-type]
    for host in (host_with(), host_with(disabled), without):
        assert host.report() == [0.0, 0.0]
        host.learn([[0.0, 0.0], [0.0, 0.0]])
    host_with(own).learn([[1024.0, 0.0], [0.0, 0.0]])  # a worker without one
    assert own.get_scale() == 1024.0

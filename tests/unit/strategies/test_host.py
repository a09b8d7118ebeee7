"""What Lightning's side tells the engine, and learns from the other workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resist_lightning.strategies.host import LightningHost


def scaler(scale: float) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=scale)
    made.scale(torch.ones(()))  # it makes its state in the first use
    return made


def host_with(scaler: Any = None, *, stop: bool = False, signal: bool = False) -> LightningHost:
    plugin = SimpleNamespace(scaler=scaler)
    return LightningHost(SimpleNamespace(precision_plugin=plugin, should_stop=stop, received_sigterm=signal))  # type: ignore[arg-type]


def test_every_reason_to_stop_has_a_number_of_its_own() -> None:
    flags = [host_with(stop=stop, signal=signal).stop_flag() for stop in (False, True) for signal in (False, True)]
    assert flags[0] == 0
    assert len(set(flags)) == 4


@pytest.mark.parametrize(("mine", "others", "agreed"), [(1024.0, [512.0], 512.0), (256.0, [512.0, 1024.0], 256.0)])
def test_the_smallest_loss_scale_is_taken(mine: float, others: list[float], agreed: float) -> None:
    own = scaler(mine)
    host = host_with(own)
    assert host.report() == [mine]

    host.learn([[mine], *([other] for other in others)])

    assert own.get_scale() == agreed


def test_without_a_scaler_nothing_is_agreed_upon() -> None:
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    own = scaler(1024.0)
    for host in (host_with(), host_with(disabled), LightningHost(SimpleNamespace(precision_plugin=None))):  # type: ignore[arg-type]
        assert host.report() == [0.0]
        host.learn([[0.0], [0.0]])
    host_with(own).learn([[1024.0], [0.0]])  # a worker without one
    assert own.get_scale() == 1024.0

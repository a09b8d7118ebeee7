"""Reports of Lightning's side to the engine, and those from the other workers."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning.strategies.host import LightningHost


def scaler(scale: float) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=scale)
    made.scale(torch.ones(()))  # it makes its state at the first use
    return made


class Requests:
    """A stub for ``Signals``."""

    def __init__(self, requests: int = 0) -> None:
        self.requests = requests
        self.learnt: list[int] = []

    def on_requests(self, requests: Iterable[int]) -> None:
        self.learnt += requests


def host_with(scaler: Any = None, *, stop: bool = False, signals: Any = None, manual: bool = False) -> LightningHost:
    module = SimpleNamespace(automatic_optimization=not manual)
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler), should_stop=stop, lightning_module=module
    )
    return LightningHost(trainer, signals or Requests())


def test_only_what_a_program_asks_for_is_compared_and_signals_are_told() -> None:
    signals = Requests(3)
    host = host_with(signals=signals)
    assert [host.stop_flag(), host_with(stop=True).stop_flag()] == [0, 1]
    assert host.report() == [0.0, 3.0]

    host.on_reports([[0.0, 3.0], [0.0, 0.0]])

    assert signals.learnt == [3, 0]


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize(
    ("data", "members", "divides"),
    [("shard", 1, True), ("copy", 1, False), ("copy", 2, True), ("same", 1, False)],
)
def test_the_seed_is_compared_where_shards_follow_from_it(
    data: str, members: int, divides: bool, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
    trainer: Any = SimpleNamespace(
        **dict.fromkeys(names, 1), _accelerator_connector=SimpleNamespace(use_distributed_sampler=placed)
    )

    settings = LightningHost(trainer, Requests(), data, members).settings()  # type: ignore[arg-type]

    assert settings["data"] == data
    assert settings.get("seed_everything") == ("5" if placed and divides else None)


@pytest.mark.parametrize(("mine", "others", "agreed"), [(1024.0, [512.0], 512.0), (256.0, [512.0, 1024.0], 256.0)])
def test_the_smallest_loss_scale_is_taken(mine: float, others: list[float], agreed: float) -> None:
    own = scaler(mine)
    host = host_with(own)
    assert host.report() == [mine, 0.0]

    host.agree([[mine, 0.0], *([other, 0.0] for other in others)])

    assert own.get_scale() == agreed


def test_a_resumed_run_agrees_before_its_first_step() -> None:
    """The scaler has made no state yet, and ``update`` would fail."""
    own = torch.amp.GradScaler("cpu", init_scale=4.0)
    own.load_state_dict({**scaler(512.0).state_dict(), "_growth_tracker": 7})

    host_with(own).agree([[512.0, 0.0], [256.0, 0.0]])
    own.scale(torch.ones(()))

    assert (own.get_scale(), own.state_dict()["_growth_tracker"]) == (256.0, 7)


@pytest.mark.parametrize("manual", [False, True])
def test_gradients_that_are_added_up_have_one_scale(manual: bool) -> None:
    """Two batches of gradient 1, with a handshake between them: to evaluate, or at the end of a round."""
    own, parameter = scaler(1024.0), nn.Parameter(torch.ones(1))
    host = host_with(own, manual=manual)
    for _ in range(2):
        own.scale(parameter.sum()).backward()
        host.on_reports([[1024.0, 0.0], [512.0, 0.0]])
        if manual:
            host.agree([[1024.0, 0.0], [512.0, 0.0]])
    own.unscale_(torch.optim.SGD([parameter], 1.0))
    assert parameter.grad is not None
    assert parameter.grad.item() == 2.0


def test_without_a_scaler_nothing_is_agreed_upon() -> None:
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    own = scaler(1024.0)
    without: Any = LightningHost(SimpleNamespace(precision_plugin=None), Requests())  # type: ignore[arg-type]
    for host in (host_with(), host_with(disabled), without):
        assert host.report() == [0.0, 0.0]
        host.agree([[0.0, 0.0], [0.0, 0.0]])
    host_with(own).agree([[1024.0, 0.0], [0.0, 0.0]])  # a worker without one
    assert own.get_scale() == 1024.0

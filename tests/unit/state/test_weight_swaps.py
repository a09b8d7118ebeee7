"""``eval()`` and ``train()`` of an optimizer act on a worker's own weights while the full model is in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from resist_lightning.state.weight_swaps import SwappingOptimizers


class Swapping:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def eval(self) -> None:
        self.calls.append("eval")

    def train(self) -> None:
        self.calls.append("train")


def test_calls_are_redirected_while_they_are_caught_and_never_after() -> None:
    swapping, plain, places = Swapping(), torch.optim.SGD([nn.Parameter(torch.ones(1))]), []

    def on_own_weights(act: Callable[[], Any]) -> None:
        places.append("own weights")
        act()

    swaps = SwappingOptimizers([swapping, plain], on_own_weights)
    swapping.eval()
    swaps.catch()
    swapping.train()
    assert vars(plain).get("train") is None
    swaps.release()
    swapping.eval()
    assert swapping.calls == ["eval", "train", "eval"]
    assert places == ["own weights"]
    assert vars(swapping).keys() == {"calls"}

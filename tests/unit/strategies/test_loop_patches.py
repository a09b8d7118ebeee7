"""The two methods of Lightning's loops that are replaced while a run trains."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from packaging.version import Version

from resist_lightning.comm.collective import SoloCollective
from resist_lightning.strategies.launching.signals import Signals
from resist_lightning.strategies.loop_patches import LoopPatches
from resist_lightning.strategies.patches import Patches
from resist_lightning.strategies.saving.data_position import Position


def patched(trainer: L.Trainer) -> Patches:
    patches = Patches()
    LoopPatches(trainer, Position(trainer), Signals(trainer), SoloCollective(), patches)
    return patches


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_lightning_still_has_the_methods_and_they_are_put_back(trainer_with: Callable[..., L.Trainer]) -> None:
    epoch_loop: Any = trainer_with("auto", devices=1).fit_loop.epoch_loop
    broadcasts = hasattr(epoch_loop, "_broadcast_sigterm_tensor")
    expected = Version(L.__version__) >= Version("2.5.2")
    assert broadcasts == expected, "this version of Lightning broadcasts in another way"
    methods = [(epoch_loop.val_loop, "run"), *([(epoch_loop, "_broadcast_sigterm_tensor")] if broadcasts else [])]
    before = [getattr(owner, name) for owner, name in methods]

    patches = patched(epoch_loop.trainer)
    for (owner, name), method in zip(methods, before, strict=True):
        assert getattr(owner, name) != method
    if broadcasts:
        assert epoch_loop._broadcast_sigterm_tensor() is None
    patches.remove()

    assert [getattr(owner, name) for owner, name in methods] == before
    assert not {"_broadcast_sigterm_tensor", "run"} & {*vars(epoch_loop), *vars(epoch_loop.val_loop)}
    patches.remove()  # a second time does nothing


def test_validation_draws_from_generators_of_its_own(trainer_with: Callable[..., L.Trainer]) -> None:
    trainer = trainer_with("auto", devices=1)
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    drawn = []
    val_loop.run = lambda: drawn.append(draw())  # type: ignore[method-assign]
    patches = patched(trainer)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)

    val_loop.run()

    assert len(drawn) == 1
    assert draw() == expected
    patches.remove()

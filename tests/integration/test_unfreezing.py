"""Parts of a module that are frozen at first, by hand and by Lightning's callback, against the plain loop."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from tests.helpers.plain import Classifier, batch_of
from tests.helpers.trainers import fit, loop_by_hand, run_trainers_and_by_hand
from tests.helpers.training import assert_equal_states, clone_state

State = dict[str, Tensor]
STILL = ("section1", "section2")
LATER = "section3"
LATER_RATE = 0.02


class Unfreezes(BaseFinetuning):
    """Trains the third section from the second epoch on, which begins in the middle of a round."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([getattr(pl_module.net, name) for name in (*STILL, LATER)], train_bn=True)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.section3, optimizer, lr=LATER_RATE)


class UnfreezesByHand(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        freeze(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            unfreeze(pl_module, trainer.optimizers[0])


def convolutions(module: nn.Module) -> list[nn.Parameter]:
    return [child.weight for child in module.modules() if isinstance(child, nn.Conv2d)]


def freeze(module: Any) -> None:
    for name in (*STILL, LATER):
        for weight in convolutions(getattr(module.net, name)):
            weight.requires_grad_(False)


def unfreeze(module: Any, optimizer: torch.optim.Optimizer) -> None:
    for weight in convolutions(module.net.section3):
        weight.requires_grad_(True)
    optimizer.add_param_group({"params": convolutions(module.net.section3), "lr": LATER_RATE})


class FineTuned(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def fine_tune(worker: int) -> list[State]:
    states = []
    for callback in (UnfreezesByHand(), Unfreezes()):
        module = FineTuned()
        fit(worker, module, 4, max_epochs=2, callbacks=[callback])
        states.append(clone_state(module))
    return states


def fine_tune_by_hand(worker: int) -> State:
    module = FineTuned()
    freeze(module)
    optimizer = module.configure_optimizers()

    def train_step(step: int) -> None:
        if step == 4:
            unfreeze(module, optimizer)
        optimizer.zero_grad()
        module.training_step(batch_of(worker, step), step).backward()
        optimizer.step()

    return loop_by_hand(module, [optimizer], range(8), train_step)


def test_frozen_parts_stay_and_may_be_unfrozen_in_the_middle_of_a_round() -> None:
    results, (expected, _) = run_trainers_and_by_hand(fine_tune, fine_tune_by_hand, 2)

    start = clone_state(FineTuned())
    still = [n for n in start if any(f"net.{s}." in n for s in STILL) and ("conv" in n or "shortcut" in n)]
    later = [name for name in start if f"net.{LATER}." in name and "conv1" in name]
    assert len(still) == 5
    assert len(later) == 5
    for state in itertools.chain(*results):
        assert_equal_states(state, expected, exactly=True)
        for name in still:
            torch.testing.assert_close(state[name], start[name], rtol=0, atol=0)
        for name in later:
            assert not torch.equal(state[name], start[name])

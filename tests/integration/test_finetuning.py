"""Fine-tuning by Lightning's callbacks: layers that are frozen at first and train from a later epoch on."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.auxnet import make_stages
from tests.helpers.small import Small
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import BATCHES, Augmented, SavesAt

State = dict[str, Tensor]

CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "blocks": ("resist", {"momentum": "travel", "outer": "nesterov"}, "net.stem", "net.body"),
    "a shared layer": (
        "local_sgd",
        {"momentum": "keep", "wire": "int8", "outer": "nesterov"},
        "net.body.0",
        "net.body.1",
    ),
    "neurons": ("ist", {"momentum": "travel"}, "net.0", "net.5"),
    "stages": ("auxnet", {}, "net.body.0", "net.body.3"),
}
"""Strategy, its options, the module that stays frozen, and the one that trains from the second epoch on."""
BEFORE, LATER = BATCHES, BATCHES + 2
"""Batches after which a run is stopped: the first epoch's last, before anything is unfrozen; one of the second."""


class Unfreezes(BaseFinetuning):
    def __init__(self, still: str, later: str) -> None:
        super().__init__()
        self.still, self.later = still, later

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.get_submodule(name) for name in (self.still, self.later)])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.get_submodule(self.later), optimizer, lr=0.02)


class FineTuned(Small):
    """Keeps the statistics of its first batch norms from the second epoch on."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def on_train_epoch_start(self) -> None:
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
        if self.current_epoch == 1:
            norms[0].eval()


def fit(worker: int, case: str, ckpt_path: str | None, callbacks: list[L.Callback]) -> State:
    face, options, still, later = CASES[case]
    L.seed_everything(1000 if ckpt_path is None else 77, verbose=False)
    module = FineTuned(face, 7 if ckpt_path is None else 8)
    strategy = make_stages() if face == "auxnet" else make_strategy(face, **options)
    trainer = make_trainer(strategy, max_epochs=2, callbacks=[Unfreezes(still, later), *callbacks])
    trainer.fit(module, DataLoader(Augmented(), batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    return clone_state(module)


def stops_of(case: str) -> tuple[int, ...]:
    """The callback unfreezes in a resumed run as in any other, whatever the strategy; what it added is restored."""
    return (BEFORE, LATER) if case == "blocks" else (LATER,)


def unbroken_and_resumed(worker: int, folder: str) -> dict[str, list[State]]:
    found = {}
    for case in CASES:
        own = f"{folder}/{case}"
        found[case] = [fit(worker, case, None, [SavesAt(own, stops_of(case))])]
        found[case] += [fit(worker, case, f"{own}/{stop}.ckpt", []) for stop in stops_of(case)]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[State]]]:
    return run_trainers(unbroken_and_resumed, 2, str(tmp_path_factory.mktemp("cases")))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_fine_tuning_is_the_unbroken_one(case: str, trained: list[dict[str, list[State]]]) -> None:
    face, _, still, later = CASES[case]
    start = clone_state(FineTuned(face, 7))
    weights = [name for name, value in start.items() if name.endswith("weight") and value.dim() > 1]

    for unbroken, *resumed in (found[case] for found in trained):
        assert all(torch.equal(unbroken[name], start[name]) for name in weights if name.startswith(f"{still}."))
        assert all(not torch.equal(unbroken[name], start[name]) for name in weights if name.startswith(f"{later}."))
        assert len(resumed) == len(stops_of(case))
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)

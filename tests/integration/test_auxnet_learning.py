"""``Trainer(strategy="auxnet")`` learns, and so in mixed precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.auxnet import CUTS, fit_stages, pictures
from tests.helpers.plain import Classifier
from tests.helpers.trainers import run_cases


@dataclass(frozen=True)
class Learner:
    """A training that must learn.

    Args:
        strategy: the settings.
        precision: of the Trainer.
        least: share of right answers at the end; chance is 0.25, as there are four classes.
    """

    strategy: dict[str, Any]
    precision: Any = "bf16-mixed"
    least: float = 0.8

    @property
    def workers(self) -> int:
        return 1 + len(self.strategy["cuts"])


LEARNERS = {
    "late gradients": Learner({"cuts": CUTS[2]}),
    "guesses": Learner({"method": "al-net", "cuts": CUTS[2], "aux_learning_rate": 0.1, "warmup_steps": 5}, least=0.6),
    "stored guesses": Learner({"method": "penalty-store", "cuts": CUTS[3], "warmup_steps": 10}, precision="32-true"),
}


class KeepsOutputs(L.Callback):
    """Notes the type and the numbers of the network's outputs in training."""

    def __init__(self) -> None:
        self.outputs: list[tuple[torch.dtype, list[float]]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.net.register_forward_hook(self.note)

    def note(self, net: nn.Module, _: Any, output: Tensor) -> None:
        if net.training:
            self.outputs.append((output.dtype, output.flatten().tolist()))


def learn(worker: int, case: Learner, _: str) -> tuple[float, float, list[tuple[torch.dtype, list[float]]]]:
    module, keeps = Classifier("chain"), KeepsOutputs()
    trainer = fit_stages(worker, module, case.strategy, max_epochs=6, precision=case.precision, callbacks=[keeps])
    trainer.validate(module, in_evaluation(), verbose=False)
    return float(trainer.callback_metrics["val/acc"]), float(trainer.callback_metrics["val/loss"]), keeps.outputs


def in_evaluation() -> Any:
    return torch.utils.data.DataLoader(pictures().dataset, 8)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_cases(learn, LEARNERS, tmp_path_factory.mktemp("learned"))


@pytest.mark.parametrize("name", LEARNERS)
def test_stages_learn_and_so_in_mixed_precision(name: str, learned: dict[str, list[Any]]) -> None:
    """Also the network's outputs are the same on all workers. The steps are tested in test_auxnet_training."""
    case, results = LEARNERS[name], learned[name]
    accuracy, _, outputs = results[0]
    assert accuracy > case.least
    assert len(outputs) == 6 * 5
    assert results == [results[0]] * case.workers

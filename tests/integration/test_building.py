"""Networks that are built in ``configure_model``: each worker's part of them, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from tests.helpers.plain import held_out, stream
from tests.helpers.small import LateSmall, Small
from tests.helpers.trainers import fit, make_strategy, make_trainer, run_trainers, run_trainers_to_the_end
from tests.helpers.training import assert_equal_states, clone_state


class ByParts(LateSmall):
    """Built on the meta device, so that its parts initialise themselves; all workers get worker 0's values."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()


class Reads(LateSmall):
    """Reads a weight while it is built."""

    def configure_model(self) -> None:
        super().configure_model()
        self.largest = float(self.net.stem[1].weight.max())


def late_trained(worker: int, face: str, folder: str) -> dict[str, Any]:
    """Train modules that are built late; returns their weights, and notes made on the way."""
    path = Path(folder) / face / "late.ckpt"
    found: dict[str, Any] = {}
    sanity: list[bool] = []

    class Saves(L.Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            sanity.append(True)

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                trainer.save_checkpoint(path)

    class Draws(LateSmall):
        def configure_model(self) -> None:
            super().configure_model()
            nn.Linear(4, 4)  # draws random numbers if it is built with values

    module = Draws(face)
    validated = {"val_dataloaders": held_out(worker), "num_sanity_val_steps": 2, "callbacks": [Saves()]}
    trainer = fit(worker, module, 8, make_strategy(face), **validated)
    found["whole"], found["drawn"] = clone_state(module), float(torch.rand(1))
    assert (sanity, trainer.num_sanity_val_steps) == ([], 2)
    for name, made in (("resumed", LateSmall(face)), ("resumed by parts", ByParts(face))):
        made_trainer = make_trainer(make_strategy(face), max_epochs=1)
        made_trainer.fit(made, stream(worker, 8), ckpt_path=path)
        found[name] = clone_state(made)
    parts, whole = ByParts(face), Small(face)
    for name, made in (("by parts", parts), ("built whole", whole)):
        fit(worker, made, 8, make_strategy(face))
        found[name] = clone_state(made)
    return found


def both_late_trained(worker: int, folder: str) -> dict[str, dict[str, Any]]:
    return {face: late_trained(worker, face, folder) for face in ("resist", "ist")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_trainers(both_late_trained, 2, str(tmp_path_factory.mktemp("late")))


@pytest.mark.parametrize("face", ["resist", "ist"])
def test_what_is_built_late_resumes_exactly_and_needs_no_sanity_check(face: str, trained: list[dict[str, Any]]) -> None:
    results = [of_worker[face] for of_worker in trained]
    for found in results:
        for name in ("resumed", "resumed by parts", "built whole"):
            assert_equal_states(found[name], found["whole"], exactly=True)
        assert found["drawn"] == results[0]["drawn"]
        assert_equal_states(found["by parts"], results[0]["by parts"], exactly=True)


class WithBias(LateSmall):
    """Has a parameter of its own, whose value only this code knows."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "bias"):
            self.bias = nn.Parameter(torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


def run_again(worker: int, folder: str) -> list[Any]:
    """Train, and run the same script again, in which the training is complete; returns the tests of both."""
    tested = []
    for ckpt_path in (None, Path(folder) / "end.ckpt"):
        trainer, module = make_trainer(make_strategy(), max_epochs=1), WithBias()
        trainer.fit(module, stream(worker, 4), ckpt_path=ckpt_path)
        if ckpt_path is None:
            trainer.save_checkpoint(Path(folder) / "end.ckpt")
        tested += trainer.test(module, held_out(worker), verbose=False)
    return tested


def test_a_script_whose_training_is_complete_evaluates_what_is_built_late(tmp_path: Path) -> None:
    for first, again in run_trainers(run_again, 2, str(tmp_path)):
        assert again == first


def train_reading(worker: int) -> None:
    fit(worker, Reads(), 8)


def test_reading_what_another_worker_sends_is_an_error_that_says_so() -> None:
    *_, outcome = run_trainers_to_the_end(train_reading, 2)
    assert isinstance(outcome.error, RuntimeError)
    assert str(outcome.error).startswith("`configure_model` reads values of parameters, but on worker 1 they have none")

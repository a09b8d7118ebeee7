"""Networks that are built in ``configure_model``: what each worker has of them, and where they resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from tests.helpers.plain import Late, held_out, make_net, stream
from tests.helpers.trainers import fit, make_strategy, make_trainer, run_trainers, run_trainers_to_the_end
from tests.helpers.training import assert_equal_states, clone_state


class ByParts(Late):
    """Built on the meta device, so that its parts make their values; worker 0's are those of the others."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = make_net()


class Reads(Late):
    """Reads a weight while it is built."""

    def configure_model(self) -> None:
        super().configure_model()
        self.largest = float(self.net.stem.weight.max())


def late_trained(worker: int, folder: str) -> dict[str, Any]:
    """Trainings of modules that are built late, and what is seen on the way."""
    path = Path(folder) / "late.ckpt"
    found: dict[str, Any] = {}
    sanity: list[bool] = []

    class Saves(L.Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            sanity.append(True)

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                trainer.save_checkpoint(path)

    class Draws(Late):
        def configure_model(self) -> None:
            super().configure_model()
            nn.Linear(4, 4)  # draws random numbers where it is made with values

    module = Draws()
    validated = {"val_dataloaders": held_out(worker), "num_sanity_val_steps": 2, "callbacks": [Saves()]}
    trainer = fit(worker, module, 8, **validated)
    found["whole"], found["drawn"] = clone_state(module), float(torch.rand(1))
    assert (sanity, trainer.num_sanity_val_steps) == ([], 2)
    for name, made in (("resumed", Late()), ("resumed by parts", ByParts())):
        made_trainer = make_trainer(make_strategy(), max_epochs=1)
        made_trainer.fit(made, stream(worker, 8), ckpt_path=path)
        found[name] = clone_state(made)
    parts = ByParts()
    fit(worker, parts, 8)
    found["by parts"] = clone_state(parts)
    return found


def test_what_is_built_late_resumes_exactly_and_needs_no_sanity_check(tmp_path: Path) -> None:
    results = run_trainers(late_trained, 2, str(tmp_path))
    for found in results:
        for name in ("resumed", "resumed by parts"):
            assert_equal_states(found[name], found["whole"], exactly=True)
        assert found["drawn"] == results[0]["drawn"]
        assert_equal_states(found["by parts"], results[0]["by parts"], exactly=True)


def train_reading(worker: int) -> None:
    fit(worker, Reads(), 8)


def test_reading_what_another_worker_sends_is_an_error_that_says_so() -> None:
    *_, outcome = run_trainers_to_the_end(train_reading, 2)
    assert isinstance(outcome.error, RuntimeError)
    assert str(outcome.error).startswith("`configure_model` reads values of parameters, and on worker 1 they have none")

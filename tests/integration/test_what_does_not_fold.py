"""State of the full model beside its weights is in its checkpoint, and comes back from workers (contract 15)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.plain import Classifier, batch_of, evaluate, held_out, stream
from tests.helpers.processes import run_workers
from tests.helpers.programs import as_a_main_process
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers

METHODS: dict[str, dict[str, Any]] = {
    "hooks": {},
    "batch statistics": {"batch_norm": "batch"},
    "ist, batch statistics": {"face": "ist", "batch_norm": "batch"},
}


class Tanh(nn.Tanh):
    """An activation that ends a block's branch, so no scale folds into it."""


class Odd(Classifier):
    """A network whose blocks are scaled by hooks."""

    def __init__(self, kind: str = "preact") -> None:
        super().__init__(kind=kind)
        if kind == "preact":
            for block in self.net.section3:
                block.conv2 = nn.Sequential(block.conv2, Tanh())


def kind_of(name: str) -> str:
    return "chain" if name.startswith("ist") else "preact"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def trained(worker: int, folder: str) -> dict[str, Any]:
    """For each method, losses of the full model: in ``fit``, of the module after it, and in other loops."""
    found = {}
    for name, options in METHODS.items():
        module = Odd(kind_of(name))
        trainer = make_trainer(make_strategy(**options), max_epochs=1)
        trainer.fit(module, stream(worker, 4), held_out(worker))
        metrics = {"fit": float(trainer.callback_metrics["val/loss"]), "module": evaluate(module, 2)["loss"]}
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        metrics["validate"] = trainer.validate(module, held_out(worker), verbose=False)[0]["val/loss"]
        other = copy.deepcopy(module)
        metrics["copy"] = evaluate(other, 2)["loss"]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        path = f"{folder}/{name}.ckpt"
        metrics["test"] = trainer.test(module, held_out(worker), ckpt_path=path, verbose=False)[0]["test/loss"]
        found[name] = metrics
    return found


@pytest.fixture(scope="module")
def reported(folder: Path) -> dict[str, float]:
    first, second = run_trainers(trained, 2, str(folder))
    for name in METHODS:
        losses = [*first[name].values(), *second[name].values()]
        assert losses == pytest.approx([first[name]["fit"]] * len(losses), abs=1e-6), name
    return {name: metrics["fit"] for name, metrics in first.items()}


def test_the_module_in_hand_evaluates_to_what_was_reported(reported: dict[str, float]) -> None:
    assert set(reported) == set(METHODS)


def evaluated(worker: int, folder: str, workers: int) -> dict[str, tuple[float, float]]:
    """For each checkpoint, in a new process: the loss from ``test``, and that of the outputs of ``predict``."""
    found = {}
    for name, options in METHODS.items():
        trainer, module = make_trainer(make_strategy(**options)), Odd(kind_of(name))
        path, parts = f"{folder}/{name}.ckpt", range(worker, 2, workers)
        batches = [batch_of(100 + part, step) for part in parts for step in range(2)]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        tested = trainer.test(module, loader, ckpt_path=path, verbose=False)[0]["test/loss"]
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        logits: Any = trainer.predict(module, loader, ckpt_path=path)
        losses = [nn.functional.cross_entropy(y, label) for y, (_, label) in zip(logits, batches, strict=True)]
        found[name] = tested, float(torch.stack(losses).mean())
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_checkpoint_evaluates_to_what_was_reported_in_a_new_process(
    workers: int, reported: dict[str, float], folder: Path
) -> None:
    results = run_trainers(evaluated, workers, str(folder), workers)
    for name, loss in reported.items():
        assert results[0][name][0] == pytest.approx(loss, abs=1e-6)
        assert sum(found[name][1] for found in results) / workers == pytest.approx(loss, abs=1e-6)


class Loaders(Odd):
    def train_dataloader(self) -> Any:
        return stream(self.trainer.global_rank, 4)

    def val_dataloader(self) -> Any:
        return held_out(self.trainer.global_rank)

    test_dataloader = val_dataloader


def forked(_: int, folder: str) -> list[float]:
    """The reported loss, and that of the module in the main process, before and after testing a checkpoint there."""
    as_a_main_process()
    trainer = make_trainer(make_strategy(start_method="fork"), max_epochs=1, devices=2)
    module = Loaders()
    trainer.fit(module)
    losses = [float(trainer.callback_metrics["val/loss"]), evaluate(module, 2)["loss"]]
    trainer.save_checkpoint(f"{folder}/forked.ckpt")
    plain = torch.load(f"{folder}/forked.ckpt", weights_only=True)
    del plain["resist_lightning"]
    torch.save(plain, f"{folder}/plain.ckpt")
    trainer.test(module, ckpt_path=f"{folder}/plain.ckpt", verbose=False)
    return [*losses, evaluate(module, 2)["loss"]]


def test_after_forked_workers_the_module_in_hand_is_the_full_model(tmp_path: Path) -> None:
    losses = run_workers(forked, 1, str(tmp_path))[0]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)

"""``Trainer(strategy="ist")`` resumes from any batch, with other workers, and from or to another strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from resist_lightning import NeuronConfig
from tests.helpers.plain import Classifier, stream
from tests.helpers.trainers import fit, make_strategy, make_trainer, run_cases, run_trainers, train_in_one_process
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import Case, unbroken_and_resumed

State = dict[str, Tensor]


CASES = {
    "alone": Case(1, "ist", {"momentum": "keep", "batch_norm": "running"}, "sgd", "endless", 2, (3,), early=True),
    "restarts": Case(
        2, "ist", {"momentum": "reset", "batch_norm": "recalibrate"}, "sgd", "endless", 2, (6,), early=True
    ),
    "stays": Case(2, "ist", {"momentum": "keep", "batch_norm": "running"}, "adamw", "shuffled", 2, (8,)),
    "travels": Case(2, "ist", {"momentum": "travel", "batch_norm": "batch"}, "adamw", "endless", 1, (4,), early=True),
    "of three": Case(3, "ist", {"momentum": "travel", "batch_norm": "recalibrate"}, "adamw", "shuffled", 1, (7,)),
}
"""By what becomes of the momentum."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[State]]]:
    return run_cases(unbroken_and_resumed, CASES, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_after_any_batch_is_the_unbroken_run(name: str, trained: dict[str, Any]) -> None:
    """With every policy of momentum and one to three workers; accumulated gradients are saved, too."""
    assert len(trained[name]) == CASES[name].workers
    for unbroken, *resumed in trained[name]:
        assert len(resumed) == 1
        assert_equal_states(resumed[0], unbroken, exactly=True)


class Saves(L.Callback):
    def __init__(self, path: str, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


def train_from(worker: int, strategy: str, ckpt_path: str | None, save_to: str | None, **options: Any) -> State:
    module = Classifier("chain", seed=7 if ckpt_path is None else 1, optimizer="adamw")
    callbacks = [Saves(save_to, 4)] if save_to else []
    made = "ddp" if strategy == "ddp" else make_strategy(strategy, **options)
    trainer = make_trainer(made, max_epochs=1, callbacks=callbacks)
    trainer.fit(module, stream(worker, 8, start=4 if ckpt_path else 0), ckpt_path=ckpt_path)
    return clone_state(module)


CHANGES = (("ddp", "ist"), ("ist", "ddp"), ("local_sgd", "ist"))


def change_strategies(worker: int, folder: str) -> list[State]:
    for before, _ in CHANGES:
        train_from(worker, before, None, f"{folder}/{before}.ckpt")
    return [train_from(worker, after, f"{folder}/{before}.ckpt", None) for before, after in CHANGES]


def test_a_checkpoint_of_one_strategy_starts_another(tmp_path: Path) -> None:
    """Plain training's optimizer state is that of the full model; it is cut with the neurons."""
    names = [name for name, _ in Classifier("chain").named_parameters()]
    for (before, _), first, second in zip(CHANGES, *run_trainers(change_strategies, 2, str(tmp_path)), strict=True):
        saved = torch.load(tmp_path / f"{before}.ckpt", weights_only=True)["state_dict"]
        for name in names:  # DDP's workers have batch-norm statistics of their own
            assert torch.equal(first[name], second[name])
            distance = (first[name] - saved[name]).abs().max()
            assert 0 < distance < 0.1


def train_in_mid_round(worker: int, path: str) -> None:
    fit(worker, Classifier("chain"), 6, make_strategy("ist"), callbacks=[Saves(path, 4)])


def go_on(worker: int, path: str) -> State:
    module = Classifier("chain", seed=1)
    trainer = make_trainer(make_strategy("ist"), max_epochs=1)
    trainer.fit(module, stream(worker, 6, start=6), ckpt_path=path)  # the two batches that were left
    return clone_state(module)


def test_a_checkpoint_in_mid_round_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    run_trainers(train_in_mid_round, 2, path)
    results = run_trainers(go_on, 3, path)

    module = Classifier("chain")
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    simulator = train_in_one_process(module, NeuronConfig(local_steps=3), 3, 2, first_step=6)
    parameters = dict(simulator.full_model().named_parameters())
    for state in results:
        assert_equal_states(state, results[0], exactly=True)
        assert_equal_states({name: state[name] for name in parameters}, parameters)

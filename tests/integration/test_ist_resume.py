"""``Trainer(strategy="ist")`` resumes from any batch, with other workers, and from or to another strategy."""

from __future__ import annotations

import random
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
from tests.integration.test_exact_resume import BATCHES, EPOCHS, STOPS_PER_CASE, Case, unbroken_and_resumed

State = dict[str, Tensor]


def draw_case(number: int) -> Case:
    """A random run, and random batches after which it is stopped."""
    drawn = random.Random(number)
    options = {
        "momentum": ("reset", "keep", "travel")[number % 3],
        "batch_norm": drawn.choice(["recalibrate", "running", "batch"]),
        "seed": number,
    }
    return Case(
        workers=1 + number // 3,
        face="ist",
        options=options,
        optimizer=drawn.choice(["sgd", "adamw"]),
        loader=drawn.choice(["shuffled", "endless"]),
        accumulate=drawn.choice([1, 2]),
        stops=tuple(sorted(drawn.sample(range(1, EPOCHS * BATCHES), STOPS_PER_CASE))),
        early=number % 2 == 1,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[State]]]:
    cases = {number: draw_case(number) for number in range(9)}
    return run_cases(unbroken_and_resumed, cases, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("number", range(9))
def test_a_run_resumed_after_any_batch_is_the_unbroken_run(number: int, trained: dict[int, Any]) -> None:
    """With every policy of momentum and one to three workers; accumulated gradients are saved, too."""
    case = draw_case(number)
    assert len(trained[number]) == case.workers
    for unbroken, *resumed in trained[number]:
        assert len(resumed) == len(case.stops)
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)


def test_the_cases_have_all_of_it() -> None:
    cases = [draw_case(number) for number in range(9)]
    assert {(case.workers, case.options["momentum"]) for case in cases} == {
        (workers, momentum) for workers in (1, 2, 3) for momentum in ("reset", "keep", "travel")
    }
    assert {case.accumulate for case in cases if case.workers > 1} == {1, 2}
    assert {case.optimizer for case in cases} == {"sgd", "adamw"}


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


@pytest.mark.parametrize(("before", "after"), [("ddp", "ist"), ("ist", "ddp"), ("local_sgd", "ist")])
def test_a_checkpoint_of_one_strategy_starts_another(before: str, after: str, tmp_path: Path) -> None:
    """Plain training's optimizer state is that of the full model; it is cut with the neurons."""
    path = str(tmp_path / "a.ckpt")
    run_trainers(train_from, 2, before, None, path)
    states = run_trainers(train_from, 2, after, path, None)

    saved = torch.load(path, weights_only=True)["state_dict"]
    names = [name for name, _ in Classifier("chain").named_parameters()]
    for name in names:  # DDP's workers have batch-norm statistics of their own
        assert torch.equal(states[0][name], states[1][name])
        distance = (states[0][name] - saved[name]).abs().max()
        assert 0 < distance < 0.1


def train_in_mid_round(worker: int, path: str) -> None:
    fit(worker, Classifier("chain"), 6, make_strategy("ist"), callbacks=[Saves(path, 4)])


def go_on(worker: int, path: str) -> State:
    module = Classifier("chain", seed=1)
    trainer = make_trainer(make_strategy("ist"), max_epochs=1)
    trainer.fit(module, stream(worker, 6, start=6), ckpt_path=path)  # the two batches that were left
    return clone_state(module)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_checkpoint_in_mid_round_resumes_with_another_number_of_workers(workers: int, tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    run_trainers(train_in_mid_round, 2, path)
    results = run_trainers(go_on, workers, path)

    module = Classifier("chain")
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    simulator = train_in_one_process(module, NeuronConfig(local_steps=3), workers, 2, first_step=6)
    parameters = dict(simulator.full_model().named_parameters())
    for state in results:
        assert_equal_states(state, results[0], exactly=True)
        assert_equal_states({name: state[name] for name in parameters}, parameters)

"""``Trainer(strategy="auxnet")``: checkpoints are plain models, and a run resumes exactly from any of them."""

from __future__ import annotations

import logging
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.auxnet import CUTS, Metered, Pictures, fit_stages, make_stages, told
from tests.helpers.nets import MlpBlock
from tests.helpers.plain import BATCH_SIZE, CLASSES, Classifier, batch_of, evaluate
from tests.helpers.stages import SmallViT
from tests.helpers.trainers import make_trainer, run_cases, run_trainers
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import SavesAt

State = dict[str, Tensor]

BATCHES = 5  # in an epoch; there is a handshake every three steps


# ------------------------------------------------------------------ a checkpoint is a model


def in_turn() -> DataLoader[Any]:
    """A loader of all workers' ``held_out``, from which Lightning gives worker 0 the even batches."""
    batches = [batch_of(100 + worker, step) for step in range(2) for worker in range(2)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train_and_save(worker: int, folder: str) -> dict[str, Any]:
    module = Metered()
    best = ModelCheckpoint(folder, monitor="val/loss", filename="val-{step}", save_top_k=-1)
    by_training = ModelCheckpoint(folder, monitor="loss_epoch", filename="train-{epoch}", save_top_k=1)
    stopping = EarlyStopping("val/loss", mode="max", min_delta=1e9, patience=1)  # no epoch but the first improves
    logger = CSVLogger(folder) if worker == 0 else CSVLogger(f"{folder}/other")
    trainer = fit_stages(
        *(worker, module, {"cuts": CUTS[2]}),
        validation=in_turn(),
        max_epochs=9,
        enable_checkpointing=True,
        callbacks=[best, by_training, stopping, LearningRateMonitor("step")],
        logger=logger,
        log_every_n_steps=1,
    )
    at_end, epochs = clone_state(module), trainer.current_epoch
    trainer.save_checkpoint(f"{folder}/end.ckpt")
    found = {
        "epochs": epochs,
        "best": (best.best_model_path, float(best.best_model_score)),
        "of training": (by_training.best_model_path, float(by_training.best_model_score)),
        "validated": metrics_of(trainer.validate(module, in_turn(), verbose=False)[0]),
        "tested": metrics_of(trainer.test(module, in_turn(), ckpt_path="best", verbose=False)[0]),
        "predicted": trainer.predict(module, in_turn()),
        "state": at_end,
    }
    return {**found, "elsewhere": evaluate_anywhere(worker, make_stages(), f"{folder}/end.ckpt")}


def evaluate_anywhere(worker: int, strategy: Any, path: str) -> tuple[dict[str, float], dict[str, float], State]:
    """Evaluates a checkpoint with another Trainer and another module."""
    module, trainer = Metered(seed=worker), make_trainer(strategy)
    validated = trainer.validate(module, in_turn(), ckpt_path=path, verbose=False)[0]
    tested = trainer.test(module, in_turn(), ckpt_path=path, verbose=False)[0]
    return metrics_of(validated), metrics_of(tested), clone_state(module)


def metrics_of(logged: Any) -> dict[str, float]:
    return {key.split("/")[1]: float(value) for key, value in logged.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> list[dict[str, Any]]:
    return run_trainers(train_and_save, 2, str(folder))


def test_checkpoints_are_plain_models_and_evaluate_as_reported(evaluated: list[dict[str, Any]], folder: Path) -> None:
    for found in evaluated:
        assert found["epochs"] == 2
        for same in ("best", "of training", "validated", "tested"):
            assert found[same] == evaluated[0][same]
        assert_equal_states(found["state"], evaluated[0]["state"], exactly=True)
    names = clone_state(Metered()).keys()
    saved = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    train = Path(evaluated[0]["of training"][0]).name
    assert saved.keys() == {"val-step=5.ckpt", "val-step=10.ckpt", "end.ckpt", train}
    loss_of = {}
    for name, checkpoint in saved.items():
        assert checkpoint["state_dict"].keys() == names
        module = Classifier(**checkpoint["hyper_parameters"])
        weights = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("accuracy")}
        module.load_state_dict(weights, strict=True)
        loss_of[name] = evaluate(module, 2)
    best_path, best_score = evaluated[0]["best"]
    best = loss_of[Path(best_path).name]
    assert best_score == pytest.approx(best["loss"], abs=1e-6)
    assert best["loss"] == min(loss_of[f"val-step={step}.ckpt"]["loss"] for step in (5, 10))
    assert evaluated[0]["tested"] == pytest.approx(best, abs=1e-6)
    assert evaluated[0]["validated"] == pytest.approx(loss_of["end.ckpt"], abs=1e-6)
    loaded = Metered()
    loaded.load_state_dict(saved[Path(best_path).name]["state_dict"])
    for worker, found in enumerate(evaluated):
        for step, predicted in enumerate(found["predicted"]):
            torch.testing.assert_close(predicted, loaded.eval()(batch_of(100 + worker, step)[0]))
    rows = next(folder.glob("lightning_logs/version_0/metrics.csv")).read_text().splitlines()
    assert "lr-SGD" in rows[0]


def test_a_checkpoint_is_evaluated_alike_under_this_strategy_and_without_it(
    evaluated: list[dict[str, Any]], folder: Path
) -> None:
    state = evaluated[0]["state"]
    module = Metered()
    module.load_state_dict(state)
    expected = evaluate(module, 2)
    plain = evaluate_anywhere(0, "auto", f"{folder}/end.ckpt")
    for validated, tested, loaded in [plain, *(found["elsewhere"] for found in evaluated)]:
        assert validated == tested == pytest.approx(expected, abs=1e-6)
        assert_equal_states(loaded, state, exactly=True)


def norm_policy(worker: int, policy: str) -> tuple[float, float, State]:
    module = Metered()
    seen: list[float] = []

    class Sees(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["val/loss"]))

    strategy = {"method": "penalty", "cuts": CUTS[2], "batch_norm": policy, "warmup_steps": 0}
    trainer = fit_stages(worker, module, strategy, validation=in_turn(), callbacks=[Sees()])
    after = trainer.validate(module, in_turn(), verbose=False)[0]["val/loss"]
    return seen[0], after, clone_state(module)


POLICIES = ("recalibrate", "running", "batch")


def norm_policies(worker: int) -> list[tuple[float, float, State]]:
    return [norm_policy(worker, policy) for policy in POLICIES]


def test_batch_norm_statistics_are_by_policy_of_guesses_of_images_or_of_the_batch() -> None:
    """Training is the same with all policies; in training a stage's norms see guesses."""
    found = dict(zip(POLICIES, zip(*run_trainers(norm_policies, 2), strict=True), strict=True))
    for policy in POLICIES:
        (during, after, state), theirs = found[policy]
        assert during == theirs[0]
        assert during == after, policy  # also with batch statistics, which the module continues to use
        weights = {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}
        reference = found["running"][0][2]
        assert_equal_states(weights, {name: reference[name] for name in weights}, exactly=True)
    losses = {policy: results[0][0] for policy, results in found.items()}
    assert len(set(losses.values())) == 3


# ------------------------------------------------------------------ exact resume


class Augmented(Pictures):
    """Samples with noise from every generator that a user's transforms may use."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image + torch.randn(3, 8, 8) / 2 + random.random() / 2, label


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def residual_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), *(MlpBlock(8) for _ in range(4)), nn.Linear(8, CLASSES))


@dataclass(frozen=True)
class Case:
    """A run, and the batches after which it is stopped."""

    strategy: dict[str, Any]
    workers: int = 2
    accumulate: int = 1
    optimizer: str = "sgd"
    processes: bool = False
    clip: float | None = None  # by value; behind the warm-up stages with late gradients have none at first
    network: Callable[[], nn.Module] | None = None  # None is a chain with batch norm
    stops: tuple[int, ...] = ()
    """In mid-epoch after 3 batches, where a handshake is due, after 1 and 7, where none is; after 5 an epoch ends."""


CASES = {
    "penalty, three workers, cut by time": Case(
        {"method": "penalty"}, workers=3, optimizer="adamw", stops=(7,), network=residual_mlp
    ),
    "al-store, cut where the user says": Case(
        {"method": "al-store", "multiplier_every": 2, "cuts": CUTS[2]}, stops=(5, 7)
    ),
    "late gradients, three workers, cut by time": Case(
        {"method": "delayed"}, workers=3, optimizer="adamw", clip=0.01, stops=(1,), network=residual_mlp
    ),
    "late gradients that add up": Case({"method": "delayed", "delay": 2, "cuts": CUTS[2]}, accumulate=2, stops=(3, 7)),
    "al-net, beta grows, gradients that add up, loader processes": Case(
        {"method": "al-net", "multiplier_every": 2, "beta_growth": 3.0},
        accumulate=2,
        processes=True,
        network=partial(SmallViT, dropout=0.2),
        stops=(3, 7),
    ),
}


def train(worker: int, case: Case, ckpt_path: str | None, callbacks: list[L.Callback]) -> State:
    L.seed_everything(1000 + worker if ckpt_path is None else 77, verbose=False)
    module = Scheduled("chain", optimizer=case.optimizer, seed=7 if ckpt_path is None else 8)
    if case.network is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            module.net = case.network()
    processes = {"num_workers": 1, "multiprocessing_context": "fork"} if case.processes else {}
    loader = DataLoader(Augmented(), BATCH_SIZE, shuffle=True, **processes)
    fit_stages(
        *(worker, module, case.strategy, loader),
        max_epochs=2,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        gradient_clip_algorithm="value",
        callbacks=callbacks,
        ckpt_path=ckpt_path,
    )
    return clone_state(module)


def unbroken_and_resumed(worker: int, case: Case, folder: str) -> list[State]:
    states = [train(worker, case, None, [SavesAt(folder, case.stops)])]
    return states + [train(worker, case, f"{folder}/{stop}.ckpt", []) for stop in case.stops]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[State]]]:
    return run_cases(unbroken_and_resumed, CASES, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_after_any_batch_is_the_unbroken_run(name: str, trained: dict[str, Any]) -> None:
    """Guesses, multipliers, momentum and where the network is cut included."""
    case = CASES[name]
    assert len(trained[name]) == case.workers
    for unbroken, *resumed in trained[name]:
        assert len(resumed) == len(case.stops)
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)


def go_on(worker: int, path: str) -> tuple[State, list[str], int, list[str], list[str]]:
    held: list[str] = []
    said: list[str] = []

    class Sees(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            held[:] = [name for name, parameter in module.named_parameters() if not parameter.is_meta]

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    module = Scheduled("chain", seed=8)
    loader = DataLoader(Augmented(), BATCH_SIZE, shuffle=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit_stages(worker, module, {}, loader, max_epochs=3, callbacks=[Sees()], ckpt_path=path)
    logger.removeHandler(handler)
    return clone_state(module), told(caught, "are missing. The training resumes"), trainer.global_step, held, said


METHODS = ("delayed", "penalty")


def save(worker: int, folder: Path) -> None:
    for method in METHODS:
        train(worker, Case({"method": method}), None, [SavesAt(str(folder / method), (7,))])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of two workers, in mid-epoch, for each method."""
    folder = tmp_path_factory.mktemp("saved")
    for method in METHODS:
        (folder / method).mkdir()
    run_trainers(save, 2, folder)
    shutil.copytree(folder / "delayed", folder / "lost")
    shutil.rmtree(folder / "lost" / "7.ckpt.workers")
    return folder


def go_on_twice(worker: int, folder: Path) -> list[Any]:
    return [go_on(worker, f"{folder}/{name}/7.ckpt") for name in ("lost", "penalty")]


@pytest.fixture(scope="module")
def gone_on(saved: Path) -> list[list[Any]]:
    """The results of both workers: with lost files, and from a checkpoint of another method."""
    first, second = run_trainers(go_on_twice, 2, saved)
    return [list(results) for results in zip(first, second, strict=True)]


def assert_whole(results: list[Any]) -> None:
    """The workers end with one model, and have trained all of it."""
    names = {name for name, _ in Scheduled("chain").named_parameters()}
    assert set().union(*(held for _, _, _, held, _ in results)) == names
    for state, _, _, held, said in results:
        assert_equal_states(state, results[0][0], exactly=True)
        assert len(held) < len(names) or len(results) == 1
        assert not any("has built the whole module" in line for line in said)  # as it must, to measure it


@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers_goes_on_from_the_full_model(workers: int, saved: Path) -> None:
    results = run_trainers(go_on, workers, str(saved / "delayed" / "7.ckpt"))

    assert_whole(results)
    for worker, (_, warned, steps, _, said) in enumerate(results):
        assert steps in (12, 15)
        assert not warned
        expected = f"The {workers} worker(s) here resume from its full model, with a new partition, in round 3"
        assert any(expected in line for line in said) == (worker == 0)


def test_where_files_are_lost_a_run_goes_on_from_the_full_model(gone_on: list[list[Any]]) -> None:
    results, _ = gone_on

    assert_whole(results)
    for worker, (_, warned, steps, _, said) in enumerate(results):
        assert steps in (12, 15)
        assert len(warned) == (worker == 0)
        assert not any("resume from its full model, with a new partition" in line for line in said)


def test_a_checkpoint_of_another_method_goes_on_from_the_full_model_and_names_both(gone_on: list[list[Any]]) -> None:
    """For example from a checkpoint that is older than a change of the default."""
    _, results = gone_on

    assert_whole(results)
    for worker, (_, _, steps, _, said) in enumerate(results):
        assert steps == 15
        expected = "method='penalty', here 'delayed'). The 2 worker(s) here resume from its full model"
        assert any(expected in line for line in said) == (worker == 0)

"""When one worker fails, no other hangs, and nothing incomplete is saved (contract 12)."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from resist_lightning import PartialModelError, WorkerLost, WorkersDisagree
from resist_lightning.comm.sockets import cut_connections
from resist_lightning.strategies.launching.signals import SAME_SECONDS
from tests.helpers.plain import Classifier, held_out, stream
from tests.helpers.trainers import fit, make_strategy, make_trainer, run_trainers, run_trainers_to_the_end
from tests.helpers.training import assert_equal_states, clone_state
from tests.helpers.worker import Outcome

SOON_SECONDS = 30.0


class Failing(Classifier):
    """Worker 1 raises: in a training step, in validation, or at the end."""

    def __init__(self, where: str) -> None:
        super().__init__("small")
        self.where = where

    def fail(self, where: str) -> None:
        if self.where == where and self.trainer.global_rank == 1:
            raise KeyError(f"a mistake in {where}")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:  # in the second round
            self.fail("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.fail("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.fail("on_train_end")


def fit_and_fail(worker: int, where: str, folder: str) -> str:
    module = Failing(where)
    saves_on_errors = where != "on_train_end"
    callbacks: list[L.Callback] = [
        ModelCheckpoint(folder, monitor="val/loss", save_last=True, save_on_exception=saves_on_errors)
    ]
    callbacks += [OnExceptionCheckpoint(folder)] if saves_on_errors else []
    try:
        fit(worker, module, 6, callbacks=callbacks, enable_checkpointing=True, val_dataloaders=held_out(worker))
    except KeyError:
        assert worker == 1
        if where == "training_step":
            absent = [parameter for parameter in module.parameters() if parameter.is_meta]
            assert absent
            with pytest.raises(PartialModelError, match="cannot be read: the training ended with an error"):
                absent[0].sum().item()
        raise
    return "finished"


def assert_all_ended(outcomes: list[Outcome], where: str, folder: Path) -> None:
    assert repr(outcomes[1].error) == repr(KeyError(f"a mistake in {where}"))
    assert isinstance(outcomes[0].error, WorkerLost)
    said = str(outcomes[0].error)
    assert re.search(rf"worker 1 \(host .+, pid \d+\) failed with KeyError: 'a mistake in {where}'", said)
    assert "Worker 1 was last doing: " in said
    saved = list(folder.rglob("*.ckpt"))
    assert len(saved) == (2 if where == "on_train_end" else 0)  # after the epoch's validation
    for path in saved:
        state = torch.load(path, weights_only=True)["state_dict"]
        Classifier("small").load_state_dict(state, strict=True)
        assert not any(value.is_meta for value in state.values())


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_end"])
def test_an_exception_on_one_worker_ends_all_with_the_error_and_no_half_a_checkpoint(
    where: str, tmp_path: Path
) -> None:
    """Also where two callbacks save on exceptions."""
    outcomes = run_trainers_to_the_end(fit_and_fail, 2, where, str(tmp_path), timeout=SOON_SECONDS)
    assert_all_ended(outcomes, where, tmp_path)


# Signals: Slurm and torchrun end workers by SIGTERM, a terminal by SIGINT. One worker is enough, and all stop together.


class Signalled(Classifier):
    """Signals its process group, loader processes included, as SLURM, torchrun and terminals do."""

    def __init__(self, number: int, workers: tuple[int, ...], times: int = 1) -> None:
        super().__init__("small")
        self.number, self.workers, self.times = number, workers, times

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4 and self.trainer.global_rank in self.workers:
            for time_ in range(self.times):
                time.sleep(time_ * 1.2 * SAME_SECONDS)
                os.killpg(0, self.number)
        return super().training_step(batch, batch_idx)


def fit_until_signalled(
    worker: int, folder: str, callback: str, batches: int, overlap: int, number: int, *args: Any
) -> None:
    callbacks: list[L.Callback] = [OnExceptionCheckpoint(folder)]
    if callback == "save_on_exception":
        callbacks = [ModelCheckpoint(folder, filename="on_exception", save_on_exception=True)]
    strategy = make_strategy(overlap=overlap)
    trainer = make_trainer(strategy, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Signalled(number, *args), stream(worker, batches, num_workers=1))


def resume_and_fit_in_one_go(worker: int, path: str, batches: int, overlap: int) -> Any:
    """The steps and the state of the resumed training, and the state of an unbroken one."""
    resumed, unbroken = Classifier("small"), Classifier("small")
    trainer = make_trainer(make_strategy(overlap=overlap), max_epochs=1)
    trainer.fit(resumed, stream(worker, batches), ckpt_path=path)
    fit(worker, unbroken, batches, make_strategy(overlap=overlap))
    return trainer.global_step, clone_state(resumed), clone_state(unbroken)


@pytest.mark.parametrize(
    ("number", "workers", "callback", "batches", "overlap", "error"),
    [
        (signal.SIGTERM, (0, 1), "save_on_exception", 7, 0, SIGTERMException),
        # One step before the round ends, when its sync begins.
        (signal.SIGINT, (1,), "OnExceptionCheckpoint", 8, 1, SystemExit),
    ],
    ids=["SIGTERM to all, before an epoch's last batch", "Ctrl-C to one, before a sync under way"],
)
def test_a_signal_ends_all_workers_when_the_round_ends_with_a_checkpoint_to_resume_from(
    number: int,
    workers: tuple[int, ...],
    callback: str,
    batches: int,
    overlap: int,
    error: type[BaseException],
    tmp_path: Path,
) -> None:
    outcomes = run_trainers_to_the_end(
        fit_until_signalled, 2, str(tmp_path), callback, batches, overlap, int(number), workers, timeout=60
    )

    assert [type(outcome.error) for outcome in outcomes] == [error, error]
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert (saved["global_step"], saved["resist_lightning"]["round"], saved["resist_lightning"]["step"]) == (6, 2, 0)
    Classifier("small").load_state_dict(saved["state_dict"], strict=True)
    path = str(tmp_path / "on_exception.ckpt")
    for steps, state, expected in run_trainers(resume_and_fit_in_one_go, 2, path, batches, overlap):
        assert steps == batches
        assert_equal_states(state, expected, exactly=True)


def test_a_second_signal_ends_the_worker_at_once_and_the_others_learn_of_it(tmp_path: Path) -> None:
    outcomes = run_trainers_to_the_end(
        fit_until_signalled, 2, str(tmp_path), "OnExceptionCheckpoint", 8, 0, int(signal.SIGTERM), (1,), 2, timeout=60
    )

    assert isinstance(outcomes[1].error, SIGTERMException)
    assert isinstance(outcomes[0].error, WorkerLost)
    assert "failed with SIGTERMException" in str(outcomes[0].error)
    assert list(tmp_path.iterdir()) == []


# Workers that take different paths.


class StopsAlone(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 4:
            trainer.should_stop = True


def stop_alone(worker: int) -> None:
    fit(worker, Classifier("small"), 8, callbacks=[StopsAlone()])


def start_differently(worker: int) -> None:
    fit(worker, Classifier("small"), 8, make_strategy(seed=worker))


@pytest.mark.parametrize(
    ("target", "message"),
    [(stop_alone, r"stop: worker 0 0, worker 1 1"), (start_differently, r"seed: worker 0 0, worker 1 1")],
    ids=["one worker stops alone", "settings differ"],
)
def test_workers_that_disagree_stop_with_an_error_that_says_so(target: Any, message: str) -> None:
    outcomes = run_trainers_to_the_end(target, 2, timeout=SOON_SECONDS)

    for outcome in outcomes:
        assert isinstance(outcome.error, WorkersDisagree)
        with pytest.raises(WorkersDisagree, match=message):
            raise outcome.error


# A user's mistakes with the module.


class KeepsGraphs(Classifier):
    """Keeps losses, whose graphs backward has used up, or outputs whose graphs still hold the weights."""

    def __init__(self, what: str) -> None:
        super().__init__("small")
        self.what = what
        self.kept: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.kept.append(loss if self.what == "losses" else self.net(batch[0]))
        return loss


def keep_graphs(worker: int, what: str) -> int:
    module = KeepsGraphs(what)
    fit(worker, module, 5)
    return len(module.kept)


def test_a_graph_that_holds_the_weights_of_a_block_gives_a_clear_error() -> None:
    for outcome in run_trainers_to_the_end(keep_graphs, 2, "outputs", timeout=SOON_SECONDS):
        assert isinstance(outcome.error, RuntimeError)
        assert "section3" in str(outcome.error)
        assert "cannot be handed over" in str(outcome.error)
        assert "detach losses and outputs before you keep them" in str(outcome.error)


class ReadsEverything(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        sum(parameter.sum().item() for parameter in module.parameters())


def read_everything(worker: int) -> None:
    fit(worker, Classifier("small"), 8, callbacks=[ReadsEverything()])


def test_reading_a_parameter_that_a_worker_lacks_raises() -> None:
    for outcome in run_trainers_to_the_end(read_everything, 2, timeout=SOON_SECONDS):
        assert isinstance(outcome.error, PartialModelError)


def refuse_averaging(worker: int) -> bool:
    with pytest.raises(ValueError, match=r"StochasticWeightAveraging .* average checkpoints after the training"):
        fit(worker, Classifier("small"), 8, callbacks=[StochasticWeightAveraging(1e-2)])
    return dist.is_initialized()


# After an error.


def fit_after_an_error(worker: int) -> list[str]:
    broken = Failing("training_step")
    broken.fail = lambda where: (_ for _ in ()).throw(KeyError("on all workers"))  # type: ignore[method-assign]
    trainer = make_trainer(make_strategy(), max_epochs=1)
    with pytest.raises(KeyError, match="on all workers"):
        trainer.fit(broken, stream(worker, 8))
    cut_connections()  # as a watchdog does that hears of another worker's error before its own worker raises
    left = [key for key in ("_broadcast_sigterm_tensor",) if key in vars(trainer.fit_loop.epoch_loop)]
    left += [key for key in ("run",) if key in vars(trainer.fit_loop.epoch_loop.val_loop)]
    module = Classifier("small")
    fit(worker, module, 5)
    left += ["group"] if dist.is_initialized() else []
    return left + [name for name, parameter in module.named_parameters() if parameter.is_meta]


def refuse_keep_and_fit(worker: int) -> tuple[bool, int, list[str]]:
    return refuse_averaging(worker), keep_graphs(worker, "losses"), fit_after_an_error(worker)


@pytest.fixture(scope="module")
def workers() -> list[tuple[bool, int, list[str]]]:
    return run_trainers(refuse_keep_and_fit, 2)


def test_stochastic_weight_averaging_is_refused_in_workers_too(workers: Any) -> None:
    assert [initialized for initialized, _, _ in workers] == [False, False]


def test_losses_may_be_kept(workers: Any) -> None:
    assert [kept for _, kept, _ in workers] == [5, 5]


def test_after_an_error_on_all_workers_another_trainer_works(workers: Any) -> None:
    """In a group of its own: up to version 0.1 in the one that the error had left, whose connections may be cut."""
    assert [left for _, _, left in workers] == [[], []]

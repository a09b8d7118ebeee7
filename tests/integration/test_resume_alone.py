"""Resuming with schedules and data of Lightning and of users, shown with one worker."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from resist_lightning.errors import CheckpointError
from tests.helpers.plain import CLASSES, held_out
from tests.helpers.small import Small
from tests.helpers.trainers import make_strategy, make_trainer
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import Augmented, FollowsTheValidation, SavesAt

STOP = 3


class Tunable(Small):
    lr = 0.05
    monitor: str | None = ""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def test_a_resumed_run_keeps_the_learning_rate_that_was_found(tmp_path: Path) -> None:
    def fit(ckpt_path: str | None, *callbacks: L.Callback) -> tuple[dict[str, Tensor], int, float]:
        L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = Tunable()
        finder = LearningRateFinder(num_training_steps=16, early_stop_threshold=None)
        trainer = make_trainer(
            make_strategy("local_sgd"), max_epochs=1, callbacks=[finder, *callbacks], default_root_dir=tmp_path
        )
        trainer.fit(
            module, DataLoader(ConcatDataset([Augmented()] * 3), batch_size=4, shuffle=True), ckpt_path=ckpt_path
        )
        return clone_state(module), trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]

    unbroken, steps, found = fit(None, SavesAt(str(tmp_path), (STOP,)))
    resumed, resumed_steps, rate = fit(f"{tmp_path}/{STOP}.ckpt")

    assert found != Tunable.lr
    assert (resumed_steps, rate) == (steps, found)
    assert_equal_states(resumed, unbroken, exactly=True)


def test_a_fit_after_the_evaluation_of_a_checkpoint_counts_its_rounds_from_its_own_first_step(tmp_path: Path) -> None:
    rounds: list[int] = []

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            strategy: Any = trainer.strategy
            rounds.append(strategy.engine.clock.round)

    loader = DataLoader(Augmented(), batch_size=4)
    first = make_trainer(make_strategy(), max_epochs=1)
    first.fit(Small(), loader)
    first.save_checkpoint(tmp_path / "a.ckpt")
    trainer, module = make_trainer(make_strategy(), max_epochs=1, callbacks=[Notes()]), Small(seed=8)
    trainer.validate(module, loader, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    trainer.fit(module, loader)
    assert rounds == [0, 0, 0, 1, 1]


def test_another_optimizer_than_that_of_the_checkpoint_is_refused_before_the_training(tmp_path: Path) -> None:
    """Torch took the hyperparameters of the checkpoint alone, and the first step ended with `KeyError: 'betas'`."""
    loader = DataLoader(Augmented(), batch_size=4)
    first = make_trainer(make_strategy(), max_steps=1)
    first.fit(Small(), loader)
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del saved["optimizer_states"][0]["class"]  # as other strategies and earlier versions have saved
    torch.save(saved, tmp_path / "b.ckpt")
    for name, written_with in (("a", "SGD"), ("b", "another optimizer")):
        with pytest.raises(CheckpointError, match=f"written with {written_with}, and does not fit AdamW"):
            make_trainer(make_strategy(), max_steps=3).fit(
                Small(optimizer="adamw"), loader, ckpt_path=tmp_path / f"{name}.ckpt"
            )
    module = Small(optimizer="adamw")
    module.load_state_dict(saved["state_dict"])
    make_trainer(make_strategy(), max_steps=1).fit(module, loader)  # the way out that the error names


class TakesTheIterator(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_takes_the_iterator_of_the_loader_resumes_at_its_batch(tmp_path: Path) -> None:
    """It resumed with the first batch of the epoch, in silence."""

    def fit(ckpt_path: Path | None, *callbacks: L.Callback) -> dict[str, Tensor]:
        L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = TakesTheIterator()
        trainer = make_trainer(make_strategy(), max_epochs=1, callbacks=[*callbacks])
        trainer.fit(module, DataLoader(Augmented(), batch_size=4, shuffle=True), ckpt_path=ckpt_path)
        return clone_state(module)

    unbroken = fit(None, SavesAt(str(tmp_path), (STOP,)))
    assert_equal_states(fit(tmp_path / f"{STOP}.ckpt"), unbroken, exactly=True)


class SavesAsEpochsBegin(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir, f"{trainer.current_epoch}.ckpt"))


class SavesInValidations(L.Callback):
    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir, f"{trainer.current_epoch}.ckpt"))


class FollowsTheSecond(FollowsTheValidation):
    """Its rate follows the loss with the second loader of the validation."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        chosen = super().configure_optimizers()
        chosen["lr_scheduler"]["monitor"] = "val/loss/dataloader_idx_1"
        return chosen


@pytest.mark.parametrize(
    ("saves", "made", "loaders"),
    [(SavesAsEpochsBegin, FollowsTheValidation, 1), (SavesInValidations, FollowsTheSecond, 2)],
    ids=["as an epoch begins", "in a validation with two loaders"],
)
def test_a_checkpoint_saved_in_a_hook_between_two_epochs_resumes_exactly(
    saves: type[L.Callback], made: type[FollowsTheValidation], loaders: int, tmp_path: Path
) -> None:
    """As an epoch begins, Lightning has the batches of the one before: it was left out, and its schedule stepped twice.

    In the other one, the metric of the schedule was not found, and its step was passed over, with a warning.
    """

    def fit(ckpt_path: Path | None, *callbacks: L.Callback) -> tuple[dict[str, Tensor], int, float]:
        L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = made(seed=7)
        trainer = make_trainer(make_strategy(), max_epochs=3, callbacks=[*callbacks], default_root_dir=tmp_path)
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the checkpoint was written before the metric")
            trainer.fit(module, loader, [held_out(0)] * loaders, ckpt_path=ckpt_path)
        return clone_state(module), trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]

    unbroken, *numbers = fit(None, saves())
    for epoch in range(3):
        resumed, *same_numbers = fit(tmp_path / f"{epoch}.ckpt")
        assert same_numbers == numbers
        assert_equal_states(resumed, unbroken, exactly=True)


@pytest.mark.parametrize("files", [True, False])
def test_a_schedule_follows_a_validation_before_the_checkpoint(files: bool, tmp_path: Path) -> None:
    """The resumed run ended at the end of the epoch: the metric was not available."""

    def fit(ckpt_path: str | None, *callbacks: L.Callback) -> tuple[dict[str, Tensor], float]:
        L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = FollowsTheValidation(seed=7)
        trainer = make_trainer(make_strategy(), max_epochs=1, callbacks=[*callbacks], val_check_interval=3)
        trainer.fit(module, DataLoader(Augmented(), batch_size=4, shuffle=True), held_out(0), ckpt_path=ckpt_path)
        return clone_state(module), trainer.optimizers[0].param_groups[0]["lr"]

    unbroken, rate = fit(None, SavesAt(str(tmp_path), (4,)))
    if files:
        resumed, its_rate = fit(f"{tmp_path}/4.ckpt")
        assert its_rate == rate
        assert_equal_states(resumed, unbroken, exactly=True)
        return
    shutil.rmtree(f"{tmp_path}/4.ckpt.workers")
    missing, passed_over = "own files beside .* are missing", "metric val/loss which is not available"
    with pytest.warns(UserWarning, match=missing), pytest.warns(RuntimeWarning, match=passed_over):
        assert fit(f"{tmp_path}/4.ckpt")[1] == pytest.approx(10 * rate)


class WholeRounds(L.Callback):
    """Notes, for each local step, whether it is in one of the last rounds, in which all workers hold all blocks."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        clock, schedule = strategy.engine.clock, strategy.engine.layout.schedule
        self.seen.append(schedule.is_whole(clock.round))


def whole_steps(folder: Path, strategy: Any, ckpt_path: str | None, *saves: L.Callback, **more: Any) -> list[bool]:
    """Train, by default for four epochs of five batches; returns what `WholeRounds` notes."""
    notes, size = WholeRounds(), more.pop("batch_size", 4)
    callbacks = [*saves, *([] if strategy == "auto" else [notes])]
    trainer = make_trainer(strategy, **{"max_epochs": 4, "default_root_dir": folder, "callbacks": callbacks, **more})
    trainer.fit(Small(), DataLoader(Augmented(), batch_size=size), ckpt_path=ckpt_path)
    return notes.seen


def test_the_last_rounds_come_where_the_checkpoint_was_of_another_training(tmp_path: Path) -> None:
    """The steps that DDP or a single process had taken counted as still to come, so that the finish never came."""
    ended, in_mid_epoch, ours = (f"{tmp_path}/{name}.ckpt" for name in ("0-epoch", "8", "7"))
    whole_steps(tmp_path, "auto", None, SavesAtEveryEnd(tmp_path), SavesAt(str(tmp_path), (8,)), max_epochs=2)

    def last_rounds(path: str, *saves: L.Callback, **more: Any) -> list[bool]:
        return whole_steps(tmp_path, make_strategy(local_steps=4, finish_rounds=1), path, *saves, **more)

    assert last_rounds(ended, SavesAt(str(tmp_path), (7,))) == [False] * 12 + [True] * 3
    assert last_rounds(ours) == [False] * 5 + [True] * 3  # of that run of 15 steps, after 7
    assert last_rounds(in_mid_epoch) == [False] * 8 + [True] * 4
    assert last_rounds(ended, max_steps=11) == [False] * 4 + [True] * 2
    assert last_rounds(ended, batch_size=2) == [False] * 28 + [True] * 2  # three epochs of 10 batches


PASSED_OVER = ".*the metric of ReduceLROnPlateau was known, so this step of the scheduler is skipped"


class Follows(Tunable):
    """Halves its learning rate at the end of every epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.monitor is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        schedule.best = 0.0  # better than any loss
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": self.monitor}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", super().training_step(batch, batch_idx))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


class SavesAtEveryEnd(L.Callback):
    """Saves after the last batch of an epoch, its validation, and its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-batch.ckpt")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-validation.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-epoch.ckpt")


def fit_and_follow(folder: Path, monitor: str | None, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], float]:
    L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    module = Follows()
    module.monitor = monitor
    saving = [] if ckpt_path else [SavesAtEveryEnd(folder)]
    trainer = make_trainer(make_strategy("local_sgd"), max_epochs=3, callbacks=saving, num_sanity_val_steps=0)
    data = DataLoader(Augmented(), batch_size=4, shuffle=True)
    trainer.fit(module, data, DataLoader(Augmented(), batch_size=8), ckpt_path=ckpt_path)
    return clone_state(module), trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("monitor", ["val/loss", "loss"])
def test_a_schedule_that_follows_a_metric_steps_at_the_end_of_the_epoch_that_was_saved(
    monitor: str, tmp_path: Path
) -> None:
    """Lightning skips this step, as the checkpoint is older; it is warned of where the metric is not known yet."""
    unbroken, rate = fit_and_follow(tmp_path, monitor)
    assert rate == Tunable.lr / 8
    # In a validation the training loss is still the last epoch's.
    for place in ("0-validation", "1-validation", "1-epoch") if monitor == "val/loss" else ("0-epoch", "1-epoch"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=PASSED_OVER)
            resumed, resumed_rate = fit_and_follow(tmp_path, monitor, tmp_path / f"{place}.ckpt")
        assert resumed_rate == rate
        assert_equal_states(resumed, unbroken, exactly=True)

    unknown = "1-batch" if monitor == "val/loss" else "1-validation"
    with pytest.warns(UserWarning, match=PASSED_OVER):
        fit_and_follow(tmp_path, monitor, tmp_path / f"{unknown}.ckpt")
    if monitor == "val/loss":
        check_schedules_of_another_number(tmp_path)


def check_schedules_of_another_number(folder: Path) -> None:
    """A schedule is removed, with a step that was passed over; and one is added to such a run."""
    with pytest.warns(UserWarning, match=r"has 1 learning-rate schedule\(s\), and .* returns 0 here"):
        assert fit_and_follow(folder, None, folder / "1-validation.ckpt")[1] == Tunable.lr / 2
    fit_and_follow(folder, None)
    with pytest.warns(UserWarning, match=r"has 0 learning-rate schedule\(s\), and .* returns 1 here"):
        assert fit_and_follow(folder, "val/loss", folder / "1-epoch.ckpt")[1] == Tunable.lr / 2


def test_batches_of_a_step_are_those_of_the_schedule_in_an_epoch_that_is_resumed(tmp_path: Path) -> None:
    def fit(ckpt_path: str | None, *callbacks: L.Callback) -> tuple[dict[str, Tensor], int]:
        L.seed_everything(1 if ckpt_path is None else 2, verbose=False)
        module = Tunable()
        schedule = GradientAccumulationScheduler({0: 2})
        trainer = make_trainer(make_strategy("local_sgd"), max_epochs=2, callbacks=[schedule, *callbacks])
        trainer.fit(module, DataLoader(Augmented(), batch_size=4, shuffle=True), ckpt_path=ckpt_path)
        return clone_state(module), trainer.global_step

    unbroken, steps = fit(None, SavesAt(str(tmp_path), (STOP,)))
    resumed, resumed_steps = fit(f"{tmp_path}/{STOP}.ckpt")

    assert resumed_steps == steps
    assert_equal_states(resumed, unbroken, exactly=True)


class Shuffled(IterableDataset[tuple[Tensor, Tensor]]):
    """Draws from a buffer with torch's global generator, or with its own."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left, generator = list(range(8)), random.Random(1)
        while left:
            place = generator.randrange(len(left)) if self.own else int(torch.randint(len(left), ()))
            number = left.pop(place)
            yield torch.full((4, 3, 8, 8), number / 8), torch.full((4,), number % CLASSES)


class Dropping(Small):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.seen: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(float(batch[0].flatten()[0]))
        return super().training_step((self.drop(batch[0]), batch[1]), batch_idx)


@pytest.mark.parametrize("own", [True, False])
def test_a_data_set_that_draws_beside_dropout_is_named_where_it_may_go_on_otherwise(own: bool, tmp_path: Path) -> None:
    def fit(ckpt_path: str | None, *callbacks: L.Callback) -> list[float]:
        L.seed_everything(1, verbose=False)
        module = Dropping()
        trainer = make_trainer(make_strategy("local_sgd"), max_epochs=1, callbacks=[*callbacks])
        trainer.fit(module, DataLoader(Shuffled(own), batch_size=None), ckpt_path=ckpt_path)
        return module.seen

    unbroken = fit(None, SavesAt(str(tmp_path), (STOP,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = fit(f"{tmp_path}/{STOP}.ckpt")

    assert any("iterable data set draws" in str(warning.message) for warning in caught) is not own
    assert (resumed == unbroken[STOP:]) is own

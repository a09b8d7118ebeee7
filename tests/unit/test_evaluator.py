"""Checkpoints of a training are evaluated beside it: each model once, at its own step, and the best one is kept."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from resist_lightning.callbacks import EndMarker
from resist_lightning.checkpoint.followed_folder import END_MARKER, FollowedFolder
from resist_lightning.errors import CheckpointError
from resist_lightning.evaluator import CheckpointEvaluator, Evaluation, hash_weights
from tests.helpers.trainers import QUIET

STEPS = 4  # in an epoch
BATCHES: Any = DataLoader([torch.ones(1, 1)] * STEPS, batch_size=None)  # type: ignore[arg-type]


class Line(L.LightningModule):
    """A module whose only weight grows by one in each step; its distance to five is evaluated."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.net = nn.Linear(1, size, bias=False)
        nn.init.zeros_(self.net.weight)
        self.places: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.net(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.places.append((self.global_step, self.current_epoch))
        self.log("val/far", (self.net(batch).sum() - 5).abs())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)


class Logged(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.append((step or 0, metrics["val/far"]))


def trainer_with(**options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "devices": 1, **options})


def train(folder: Path, *callbacks: L.Callback, epochs: int = 2, ckpt_path: Path | None = None) -> None:
    """Checkpoints after steps 2, 4, 6, 8, none with a validation; the last one is there twice."""
    saver = ModelCheckpoint(folder, "{step}", "step", mode="max", save_top_k=-1, every_n_train_steps=2, save_last=True)
    trainer = trainer_with(
        callbacks=[saver, *callbacks], enable_checkpointing=True, max_epochs=epochs, limit_val_batches=0
    )
    trainer.fit(Line(), BATCHES, ckpt_path=ckpt_path)


def follow(folder: Path, **options: Any) -> list[Evaluation]:
    given = {"monitor": "val/far", "silence": 5.0, "poll_seconds": 0.01, **options}
    trainer, model = given.pop("trainer", None) or trainer_with(), given.pop("model", None) or Line()
    return CheckpointEvaluator(trainer, **given).follow(model, folder, BATCHES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, EndMarker())
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def test_each_model_is_evaluated_once_and_logged_where_it_was_saved(folder: Path) -> None:
    logger, model = Logged(), Line()
    found = follow(folder, trainer=trainer_with(logger=logger), model=model)
    assert [(each.step, each.metrics) for each in found] == [
        (step, {"val/far": abs(step - 5)}) for step in (2, 4, 6, 8)
    ]
    assert logger.seen == [(2, 3.0), (4, 1.0), (6, 1.0), (8, 3.0)]
    assert model.places[::STEPS] == [(2, 0), (4, 0), (6, 1), (8, 1)]  # the step and epoch that the module reads
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [
        "last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt",
    ]  # fmt: skip


def test_the_best_is_kept_whatever_the_training_removes(folder: Path) -> None:
    found = follow(folder)
    assert [each.best for each in found] == [True, True, False, False]  # the first of two equally good ones
    assert [each.best for each in follow(folder, out=folder / "far", mode="max")] == [True, False, False, False]
    for path in folder.glob("*.ckpt"):
        path.unlink()
    out = folder / "evaluations"
    assert torch.load(out / "best.ckpt", weights_only=True)["global_step"] == 4
    assert sorted(path.name for path in out.iterdir()) == ["best.ckpt", "evaluations.jsonl"]


def test_the_best_is_known_again_where_its_row_could_not_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in (2, 6, 8):  # 4 would be the best
        (folder / f"step={step}.ckpt").rename(folder / f"{step}.later")
    (folder / "last.ckpt").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(FollowedFolder, "write_rows", full_disk)
        with pytest.raises(OSError, match="No space"):
            follow(folder)
    (folder / "step=4.ckpt").unlink()
    (folder / "2.later").rename(folder / "step=2.ckpt")

    found = follow(folder)

    assert [(row.checkpoint, row.best) for row in found] == [("best.ckpt", True), ("step=2.ckpt", False)]
    best = torch.load(folder / "evaluations" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 4


def test_it_goes_on_where_it_was(folder: Path) -> None:
    """Killed between two evaluations: the rows tell the finished ones, and the best."""
    later = [folder / f"{name}.ckpt" for name in ("step=6", "step=8", "last")]
    for path in later:
        path.rename(path.with_suffix(".away"))
    first = follow(folder)
    assert [each.step for each in first] == [2, 4]
    for path in later:
        path.with_suffix(".away").rename(path)
    model = Line()
    assert [each.step for each in follow(folder, model=model)] == [2, 4, 6, 8]
    assert [step for step, _ in model.places[::STEPS]] == [6, 8]
    assert torch.load(folder / "evaluations" / "best.ckpt", weights_only=True)["global_step"] == 4
    with pytest.raises(
        ValueError, match="chose the best checkpoint by min val/far, but this call asks for max val/far"
    ):
        follow(folder, mode="max")


def test_files_that_are_written_replaced_and_damaged_while_it_looks(folder: Path, tmp_path: Path) -> None:
    """It waits for a partial file, names a damaged one, and ends only when all have been examined."""
    whole = (folder / "step=8.ckpt").read_bytes()
    (folder / END_MARKER).unlink()
    (folder / "last.ckpt").unlink()
    (folder / "step=8.ckpt").write_bytes(whole[:1000])
    (folder / "step=6.ckpt").write_bytes(b"nonsense")

    def finish() -> None:
        (tmp_path / "new").write_bytes(whole)
        (tmp_path / "new").replace(folder / "step=8.ckpt")
        (folder / END_MARKER).touch()

    timer = threading.Timer(0.3, finish)
    timer.start()
    with pytest.warns(UserWarning, match=r"step=6.ckpt cannot be loaded: it is not a torch checkpoint"):
        found = follow(folder)
    timer.join()
    assert [each.step for each in found] == [2, 4, 8]


def test_a_file_that_is_removed_while_it_is_evaluated_is_evaluated_to_the_end(folder: Path) -> None:
    class Removes(Line):
        def on_validation_start(self) -> None:
            (folder / f"step={self.global_step}.ckpt").unlink(missing_ok=True)

    assert [each.step for each in follow(folder, model=Removes())] == [2, 4, 6, 8]


def test_a_second_evaluator_with_the_same_folder_of_results_is_refused(folder: Path) -> None:
    """Each evaluated a file under one name, which the other replaced: results of other checkpoints, in silence."""
    said: list[str] = []

    class Follows(Line):
        def on_validation_start(self) -> None:
            if not said:
                with pytest.raises(ValueError, match=r"another evaluator writes .* set out=FOLDER") as caught:
                    follow(folder)
                said.append(str(caught.value))
                assert len(follow(folder, out=folder / "other")) == 4

    assert len(follow(folder, model=Follows())) == 4
    assert str(folder / "evaluations") in said[0]


def test_without_a_word_of_the_training_it_ends_after_the_silence(folder: Path) -> None:
    (folder / END_MARKER).unlink()
    with pytest.warns(UserWarning, match=r"No new checkpoint in .* for 0.05 s \(silence\), and no training_ended.json"):
        assert len(follow(folder, silence=0.05)) == 4


def test_the_marker_is_written_at_the_end_and_removed_by_a_run_that_goes_on(folder: Path) -> None:
    assert json.loads((folder / END_MARKER).read_text()) == {"global_step": 2 * STEPS}

    class Fails(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        train(folder, EndMarker(), Fails(), epochs=3, ckpt_path=folder / "last.ckpt")
    assert not (folder / END_MARKER).exists()
    with pytest.raises(ValueError, match="EndMarker needs a ModelCheckpoint"):
        trainer_with(callbacks=[EndMarker()], max_epochs=1).fit(Line(), BATCHES)


def test_a_fast_dev_run_leaves_the_folder_alone(tmp_path: Path) -> None:
    """It removed the marker of a complete training, and told the evaluator of a running one that it had ended."""
    saver = ModelCheckpoint(tmp_path / "checkpoints")
    options: dict[str, Any] = {"enable_checkpointing": True, "fast_dev_run": True}
    trainer_with(callbacks=[saver, EndMarker()], **options).fit(Line(), BATCHES)
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints").mkdir()
    marker = tmp_path / "checkpoints" / END_MARKER
    marker.write_text("of the training")
    trainer_with(callbacks=[ModelCheckpoint(marker.parent), EndMarker()], **options).fit(Line(), BATCHES)
    assert marker.read_text() == "of the training"


def test_a_marker_that_cannot_be_written_does_not_end_the_run(folder: Path) -> None:
    """A full disk at the end of a training lost its model under `spawn`, in an error of the last hook."""

    class Fills(L.Callback):
        def on_train_end(self, *_: Any) -> None:
            (folder / END_MARKER).mkdir()

    with pytest.warns(UserWarning, match=r"training_ended.json could not be written .* training itself has succeeded"):
        train(folder, Fills(), EndMarker())


def test_a_checkpoint_that_waits_for_validations_which_are_off_is_refused(tmp_path: Path) -> None:
    """The demo validates every second epoch; without validations it ran to its end and saved nothing."""
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0, "check_val_every_n_epoch": 2}
    for setting, said in (
        ({}, "would never save: with check_val_every_n_epoch=2"),
        ({"monitor": "val/loss", "save_on_train_epoch_end": True}, "would never save: monitor='val/loss'"),
        ({"monitor": "step", "mode": "max", "save_on_train_epoch_end": True}, ""),
    ):
        saver = ModelCheckpoint(tmp_path, **setting)
        trainer = trainer_with(callbacks=[saver, EndMarker()], enable_checkpointing=True, **options)
        with pytest.raises(ValueError, match=said) if said else nullcontext():
            trainer.fit(Line(), BATCHES)
        assert bool(list(tmp_path.glob("*.ckpt"))) == (not said)


def missing(folder: Path) -> None:
    follow(folder / "none")


def snapshots(folder: Path) -> None:
    round = folder / "snapshots" / "round=00000012"
    round.mkdir(parents=True)
    (round / "worker-0-of-1.5f00aa21.pt").touch()
    follow(folder / "snapshots")


def nothing(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.warns(UserWarning, match="silence"):
        follow(folder / "empty", silence=0.05)


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (missing, ValueError, "is not a folder. Give the dirpath of the training's ModelCheckpoint.* mkdir -p"),
        (snapshots, ValueError, "has snapshots, in which no file is the full model"),
        (nothing, CheckpointError, "no checkpoint appeared in .*ModelCheckpoint"),
        (lambda folder: follow("memory://run"), ValueError, "folder=memory://run must be a local folder"),
        (lambda folder: follow(folder, mode="up"), ValueError, "mode='up' must be 'min' or 'max'"),
        (lambda folder: follow(folder, silence=0), ValueError, "silence=0 and poll_seconds=0.01 must be above 0"),
        (
            lambda folder: follow(folder, trainer=trainer_with(devices=2)),
            ValueError,
            "has 2 processes",
        ),
        (lambda folder: follow(folder, monitor="val/loss"), ValueError, r"'val/loss' is not logged.*\['val/far'\]"),
        (lambda folder: follow(folder, model=Line(2)), RuntimeError, "size mismatch for net.weight"),
    ],
)
def test_what_cannot_be(folder: Path, act: Callable[[Path], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        act(folder)


def test_weights_have_one_hash_in_whatever_file_they_are() -> None:
    state = {"a": torch.ones(2, 3), "b": torch.tensor(1), "extra": {"x": 1}}
    known = hash_weights(state)
    assert hash_weights(dict(state)) == known
    others = [
        {**state, "a": torch.ones(3, 2)},
        {**state, "a": torch.ones(2, 3, dtype=torch.bfloat16)},
        {**state, "b": torch.tensor(2)},
        {**state, "extra": {"x": 2}},
        {"c" if name == "a" else name: value for name, value in state.items()},
    ]
    assert len({known, *map(hash_weights, others)}) == 6

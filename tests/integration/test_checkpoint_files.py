"""Checkpoints as files: whole or absent, and errors that name the damage to one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from resist_lightning import CheckpointError, CheckpointNotWritten
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from tests.helpers.plain import stream
from tests.helpers.small import Small
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers, run_trainers_to_the_end
from tests.helpers.training import assert_equal_states, clone_state

State = dict[str, Tensor]
STEPS = 10
PARAMETERS = {name for name, _ in Small().named_parameters()}
SAVED_AFTER = 4  # in round 1, after one step of it


class Saves(L.Callback):
    def __init__(self, path: str, after: tuple[int, ...] = (SAVED_AFTER,)) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.after:
            trainer.save_checkpoint(self.path)


def save(worker: int, path: str, face: str = "resist") -> State:
    module = Small()
    trainer = make_trainer(make_strategy(face), max_epochs=1, callbacks=[Saves(path)])
    trainer.fit(module, stream(worker, STEPS))
    return clone_state(module)


def resume(worker: int, path: str, face: str = "resist") -> State:
    module = Small(seed=1)
    trainer = make_trainer(make_strategy(face), max_epochs=1)
    trainer.fit(module, stream(worker, STEPS), ckpt_path=path)
    return clone_state(module)


def files_of(path: Path) -> list[Path]:
    return sorted(path.with_name(path.name + ".workers").iterdir())


# Whole or absent.


def test_a_checkpoint_is_one_file_of_the_model_and_one_of_each_worker(saved: Path) -> None:
    path = saved
    state = torch.load(path, weights_only=True)
    assert [file.name for file in files_of(path)] == sorted(state[CHECKPOINT_KEY]["files"])
    assert [file.name.partition(".")[0] for file in files_of(path)] == [f"round=1-step=1-{w}-of-2" for w in (0, 1)]
    own = [set(torch.load(file, weights_only=True)["tensors"]) for file in files_of(path)]
    blocks = [{name.split(".")[2] for name in names if "body" in name} for names in own]
    assert blocks[0] | blocks[1] == {"0", "1", "2", "3", "4"}
    assert blocks[0] & blocks[1] == {"0"}  # each has its own blocks; the first is shared


def save_in_three_ways(worker: int, folder: str) -> str:
    """Write over a checkpoint, keep the last one, and save weights; returns messages of a resumed run."""
    over = Saves(f"{folder}/over/a.ckpt", after=(2, SAVED_AFTER))
    kept = ModelCheckpoint(f"{folder}/kept", filename="{step}", save_top_k=1, every_n_train_steps=2, save_last="link")
    weights = ModelCheckpoint(f"{folder}/weights", filename="a", save_weights_only=True, every_n_train_steps=STEPS)
    trainer = make_trainer(make_strategy(), max_epochs=1, enable_checkpointing=True, callbacks=[over, kept, weights])
    trainer.fit(Small(), stream(worker, STEPS))
    return resume_and_listen(worker, f"{folder}/kept/last.ckpt")[0]


@pytest.fixture(scope="module")
def in_three_ways(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("ways")
    return folder, run_trainers(save_in_three_ways, 2, str(folder))


def test_a_checkpoint_that_is_written_over_leaves_no_file_of_the_one_before(in_three_ways: tuple[Path, Any]) -> None:
    folder = in_three_ways[0] / "over"
    assert len(files_of(folder / "a.ckpt")) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["a.ckpt", "a.ckpt.workers"]


def test_a_checkpoint_that_is_removed_takes_the_workers_files_along_and_a_link_finds_them(
    in_three_ways: tuple[Path, list[str]],
) -> None:
    folder, said = in_three_ways[0] / "kept", in_three_ways[1]
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=10.ckpt", "step=10.ckpt.workers"]
    assert "resumes exactly" in said[0]


def test_weights_alone_have_no_files_of_workers(in_three_ways: tuple[Path, Any]) -> None:
    assert [path.name for path in (in_three_ways[0] / "weights").iterdir()] == ["a.ckpt"]


def resume_and_listen(worker: int, path: str) -> tuple[str, State]:
    """Worker 0's messages about resuming a run, and its weights."""
    import logging
    import warnings

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        state = resume(worker, path)
    said += [str(warning.message) for warning in warned]
    return "; ".join(line for line in said if "resume" in line), state


class KilledWhileSaving(L.Callback):
    """Kills worker 0 when a part of the second checkpoint is written."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == SAVED_AFTER:
            if trainer.global_rank == 0:
                from resist_lightning.checkpoint import files

                files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)


def killed_while_saving(worker: int, path: str) -> None:
    trainer = make_trainer(make_strategy(), max_epochs=1, callbacks=[KilledWhileSaving(path)])
    trainer.fit(Small(), stream(worker, STEPS))


def test_a_run_killed_while_saving_leaves_the_checkpoint_before_it(unbroken: State, tmp_path: Path) -> None:
    path = tmp_path / "b.ckpt"
    outcomes = run_trainers_to_the_end(killed_while_saving, 2, str(path))

    assert [outcome.end for outcome in outcomes] == ["SIGKILL", "exit code 1"]
    assert torch.load(path, weights_only=True)["global_step"] == 2
    for state in run_trainers(resume, 2, str(path)):
        assert_equal_states(state, unbroken, exactly=True)


# A full disk.


class FullDisk(L.Callback):
    """Saves when files of one worker are limited to 10 kB, which is too little for a checkpoint."""

    def __init__(self, path: str, full: int) -> None:
        self.path, self.full = path, full

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED_AFTER:
            with limited_files() if trainer.global_rank == self.full else nullcontext():
                trainer.save_checkpoint(self.path)


@contextmanager
def limited_files() -> Iterator[None]:
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, limit))


def save_on_a_full_disk(worker: int, path: str, full: int, on_save_error: str) -> State:
    module = Small()
    strategy = make_strategy(on_save_error=on_save_error)
    trainer = make_trainer(strategy, max_epochs=1, callbacks=[Saves(path, after=(2,)), FullDisk(path, full)])
    trainer.fit(module, stream(worker, STEPS))
    return clone_state(module)


def fail_and_go_on(worker: int, path: str, full: int) -> tuple[str, State]:
    """The error of a full disk, and the weights of a run that only warns of it."""
    with pytest.raises(CheckpointNotWritten) as caught:
        save_on_a_full_disk(worker, path, full, "raise")
    state = torch.load(path, weights_only=True)
    assert (state["global_step"], len(files_of(Path(path)))) == (2, 2)
    return str(caught.value), save_on_a_full_disk(worker, path, full, "warn")


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_ends_all_workers_or_none_and_the_checkpoint_before_stays(
    full: int, unbroken: State, tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    for error, state in run_trainers(fail_and_go_on, 2, str(path), full):
        assert f"worker {full}: File too large" in error
        assert "on_save_error='warn'" in error
        assert_equal_states(state, unbroken, exactly=True)
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert len(files_of(path)) == 2


class FillsTheDisk(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def keep_the_newest_on_a_full_disk(worker: int, folder: str) -> None:
    strategy = make_strategy(on_save_error="warn")
    newest = ModelCheckpoint(f"{folder}/newest", filename="{step}", save_top_k=1, every_n_train_steps=2)
    last = ModelCheckpoint(f"{folder}/last", filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last="link")
    callbacks = [FillsTheDisk(), newest, last]
    trainer = make_trainer(strategy, max_epochs=1, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(Small(), stream(worker, 6))


def test_a_checkpoint_is_kept_where_the_one_that_replaces_it_could_not_be_written(tmp_path: Path) -> None:
    """And the link to the last one leads to the last that was written."""
    run_trainers(keep_the_newest_on_a_full_disk, 2, str(tmp_path))

    assert torch.load(tmp_path / "newest" / "step=2.ckpt", weights_only=True)["global_step"] == 2
    assert len(files_of(tmp_path / "newest" / "step=2.ckpt")) == 2
    names = sorted(path.name for path in (tmp_path / "last").iterdir())
    assert names == ["last.ckpt", *(f"step={step}.ckpt{kind}" for step in (1, 2) for kind in ("", ".workers"))]
    assert torch.load(tmp_path / "last" / "last.ckpt", weights_only=True)["global_step"] == 2


# Files that cannot be used.


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_text("<html>Not found</html>")


def bare_weights(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)


def newer(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state[CHECKPOINT_KEY]["version"] = 99
    torch.save(state, path)


SPOILT: dict[Callable[[Path], None], str] = {
    cut_off: "truncated at",
    empty: "it is empty",
    foreign: "not a torch checkpoint",
    bare_weights: "holds a bare state_dict",
    newer: "written by a newer resist-lightning",
}


def resume_spoilt(worker: int, paths: list[str]) -> list[str]:
    errors = []
    for path in paths:
        with pytest.raises(CheckpointError) as caught:
            resume(worker, path)
        errors.append(str(caught.value))
    return errors


def test_a_file_that_cannot_be_used_is_named_and_explained(saved: Path, tmp_path: Path) -> None:
    paths = [str(shutil.copy(saved, tmp_path / f"{spoil.__name__}.ckpt")) for spoil in SPOILT]
    for spoil, path in zip(SPOILT, paths, strict=True):
        spoil(Path(path))

    for errors in run_trainers(resume_spoilt, 2, paths):
        for error, path, message in zip(errors, paths, SPOILT.values(), strict=True):
            assert message in error
            assert path in error


def resume_as_nobody(worker: int, path: str) -> None:
    resume(worker, f"{path}.readable")  # as root, who may read the files that are imported for this
    os.seteuid(65534)
    resume(worker, path)


def test_a_file_without_permission_is_named_and_explained(saved: Path, tmp_path: Path) -> None:
    path = saved
    for folder in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and folder.stat().st_uid == 0 and folder.parent != folder:
            folder.chmod(folder.stat().st_mode | 0o055)
    shutil.copy(path, f"{path}.readable")
    path.chmod(0o000)

    (outcome,) = run_trainers_to_the_end(resume_as_nobody if os.geteuid() == 0 else resume, 1, str(path))
    assert isinstance(outcome.error, CheckpointError)
    assert "this user has no permission to read it" in str(outcome.error)


def test_a_damaged_file_of_a_worker_is_an_error(saved: Path) -> None:
    cut_off(files_of(saved)[1])

    error = run_trainers_to_the_end(resume, 2, str(saved))[1].error
    assert isinstance(error, CheckpointError)
    assert "is damaged: its checksum is" in str(error)
    assert "to resume from the full model alone" in str(error)


def test_without_the_workers_files_the_run_goes_on_from_the_full_model_and_says_so(saved: Path) -> None:
    files_of(saved)[1].unlink()  # with one file missing, no worker may resume with its own tensors

    (said, first), (_, second) = run_trainers(resume_and_listen, 2, str(saved))
    assert_equal_states(first, second, exactly=True)
    assert "files beside" in said
    assert "are missing. The training resumes" in said


# From one strategy, or number of workers, to another.


CHANGES = (
    *(("ddp", "resist"), ("ddp", "local_sgd"), ("resist", "ddp"), ("resist", "local_sgd")),
    ("local_sgd", "resist"),
)


def fit_ddp(worker: int, save_to: str | None, ckpt_path: str | None) -> State:
    module = Small(seed=7 if ckpt_path is None else 1)
    callbacks = [Saves(save_to)] if save_to is not None else []
    trainer = make_trainer("ddp", max_epochs=1, callbacks=callbacks)
    trainer.fit(module, stream(worker, STEPS), ckpt_path=ckpt_path)
    return clone_state(module)


def change_strategies(worker: int, folder: str) -> list[State]:
    fit_ddp(worker, f"{folder}/ddp.ckpt", None)
    for face in ("resist", "local_sgd"):
        save(worker, f"{folder}/{face}.ckpt", face)
    paths = [f"{folder}/{before}.ckpt" for before, _ in CHANGES]
    return [
        fit_ddp(worker, None, path) if after == "ddp" else resume(worker, path, after)
        for path, (_, after) in zip(paths, CHANGES, strict=True)
    ]


def test_a_checkpoint_of_one_strategy_starts_another(tmp_path: Path) -> None:
    stem = "net.stem.1.weight"
    for (before, after), *found in zip(CHANGES, *run_trainers(change_strategies, 2, str(tmp_path)), strict=True):
        saved = torch.load(tmp_path / f"{before}.ckpt", weights_only=True)
        # DDP's workers have batch-norm statistics of their own.
        names = PARAMETERS if after == "ddp" else found[0].keys()
        states = [{name: state[name] for name in names} for state in found]
        assert_equal_states(states[0], states[1], exactly=True)
        assert saved["global_step"] == SAVED_AFTER
        distance = (states[0][stem] - saved["state_dict"][stem]).abs().max()
        assert 0 < distance < (Small(seed=1).state_dict()[stem] - saved["state_dict"][stem]).abs().max()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_checkpoint_of_two_workers_in_mid_round_resumes_with_any_number_and_says_so(
    workers: int, saved: Path
) -> None:
    results = run_trainers(resume_and_listen, workers, str(saved))

    assert len(results) == workers
    for _, state in results:
        assert_equal_states(state, results[0][1], exactly=True)
    said = (
        f"The {workers} worker(s) here resume from its full model, with a new partition, in round 2 after 0 local steps"
    )
    assert said in results[0][0]

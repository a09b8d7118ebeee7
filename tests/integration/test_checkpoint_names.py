"""Places of a checkpoint's files: beside worker 0's, under URLs, by plugins of the Trainer; and messages about them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from resist_lightning import CheckpointError, CheckpointNotWritten, WorkerLost
from resist_lightning.strategies.saving import checkpoint_files
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from tests.helpers.plain import held_out, stream
from tests.helpers.small import Small
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers, run_trainers_to_the_end
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_checkpoint_files import FillsTheDisk, Saves, files_of, resume, resume_and_listen

State = dict[str, Tensor]
STEPS = 10


def tree(folder: Path) -> list[str]:
    """All files and folders, with the workers' files by their number only."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return sorted(name.rpartition("-of-")[0].replace("round=", "") or name for name in names)


# Names that differ between the workers.


class Scattered(Small):
    """Logs a metric without ``sync_dist``, by which the workers do not agree on the best epoch."""

    def on_train_epoch_end(self) -> None:
        seen = [0.2, 0.8, 0.1, 0.7] if self.trainer.global_rank else [0.9, 0.3, 0.6, 0.4]
        self.log("own", torch.tensor(seen[self.trainer.current_epoch]))


def keep_the_best(worker: int, folder: str) -> tuple[str, State, State, State]:
    saving = ModelCheckpoint(
        folder, monitor="own", save_top_k=2, filename="{own:.1f}", auto_insert_metric_name=False,
        save_on_train_epoch_end=True,
    )  # fmt: skip
    module = Scattered()
    trainer = make_trainer(make_strategy(), max_epochs=4, enable_checkpointing=True, callbacks=[saving])
    trainer.fit(module, stream(worker, 4))
    unbroken = clone_state(module)
    trainer.validate(module, held_out(worker), ckpt_path="best", verbose=False)
    best = clone_state(module)
    again = Scattered(seed=1)
    make_trainer(make_strategy(), max_epochs=4).fit(again, stream(worker, 4), ckpt_path=f"{folder}/0.4.ckpt")
    return saving.best_model_path, unbroken, clone_state(again), best


def test_a_metric_that_is_not_reduced_names_the_files_of_all_workers_alike(tmp_path: Path) -> None:
    results = run_trainers(keep_the_best, 2, str(tmp_path))

    # Worker 0 has logged 0.9, 0.3, 0.6, 0.4: the best two are complete, and of the others no file is left.
    assert tree(tmp_path) == [
        *("0.3.ckpt", "0.3.ckpt.workers", "0.3.ckpt.workers/2-step=2-0", "0.3.ckpt.workers/2-step=2-1"),
        *("0.4.ckpt", "0.4.ckpt.workers", "0.4.ckpt.workers/5-step=1-0", "0.4.ckpt.workers/5-step=1-1"),
    ]
    for path, unbroken, resumed, best in results:
        assert path == f"{tmp_path}/0.3.ckpt"
        assert_equal_states(resumed, unbroken, exactly=True)
        assert_equal_states(best, torch.load(path, weights_only=True)["state_dict"], exactly=True)


FACES = ("resist", "ist")


class SavesAsItsOwn(L.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{self.folder}/{os.getpid()}.ckpt")


def save_under_own_names(worker: int, folder: str) -> list[tuple[State, State]]:
    found = []
    for face in FACES:
        module = Small(face)
        trainer = make_trainer(make_strategy(face), max_epochs=1, callbacks=[SavesAsItsOwn(f"{folder}/{face}")])
        trainer.fit(module, stream(worker, STEPS))
        unbroken, again = clone_state(module), Small(face, seed=1)
        trainer.fit(again, stream(worker, STEPS), ckpt_path=f"{folder}/{face}/{os.getpid()}.ckpt")
        found.append((unbroken, clone_state(again)))
    return found


def test_each_worker_may_name_a_checkpoint_and_find_it_again(tmp_path: Path) -> None:
    for found in run_trainers(save_under_own_names, 2, str(tmp_path)):
        for unbroken, resumed in found:
            assert_equal_states(resumed, unbroken, exactly=True)
    for face in FACES:
        names = [len(list((tmp_path / face).glob(kind))) for kind in ("*.ckpt", "*.ckpt.workers")]
        assert names == [1, 1]


# Other file systems.


def save_to_urls(worker: int, folder: str) -> tuple[State, State]:
    os.makedirs(f"{folder}/here", exist_ok=True)
    os.chdir(f"{folder}/here")
    url, module = f"file://{folder}", Small()
    saving = ModelCheckpoint(f"{url}/best", filename="{step}", every_n_train_steps=5)
    options = {"default_root_dir": f"{url}/root", "enable_checkpointing": True}
    strategy = make_strategy(snapshots=f"{url}/snapshots")
    trainer = make_trainer(strategy, max_epochs=1, callbacks=[Saves(f"{url}/a.ckpt"), saving], **options)
    trainer.strategy.check_before_launch(trainer)  # as launchers do
    trainer.fit(module, stream(worker, STEPS))
    assert saving.best_model_path == f"{folder}/best/step=10.ckpt"
    return clone_state(module), resume(worker, f"{url}/a.ckpt")


def test_a_file_url_names_a_local_path(tmp_path: Path) -> None:
    for unbroken, resumed in run_trainers(save_to_urls, 2, str(tmp_path)):
        assert_equal_states(resumed, unbroken, exactly=True)

    assert tree(tmp_path) == [
        *("a.ckpt", "a.ckpt.workers", "a.ckpt.workers/1-step=1-0", "a.ckpt.workers/1-step=1-1"),
        *("best", "best/step=10.ckpt", "best/step=10.ckpt.workers"),
        *("best/step=10.ckpt.workers/3-step=1-0", "best/step=10.ckpt.workers/3-step=1-1", "here"),
    ]


def save_in_memory(worker: int, folder: str) -> str:
    os.chdir(folder)
    path, module = "memory://folder/a.ckpt", Small()
    trainer = make_trainer(make_strategy(), max_epochs=1, callbacks=[Saves(path, after=(STEPS,))])
    trainer.fit(module, stream(worker, STEPS))
    said = resume_and_listen(worker, path)[0]
    import fsspec

    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(path))
    content[len(content) // 2] ^= 1
    memory.pipe_file(path, bytes(content))
    with pytest.raises(CheckpointError, match=r"memory://folder/a\.ckpt is damaged"):
        trainer.validate(module, held_out(worker), ckpt_path=path, verbose=False)
    return said


def test_another_file_system_has_the_full_model(tmp_path: Path) -> None:
    assert "has only the full model" in run_trainers(save_in_memory, 1, str(tmp_path))[0]
    assert list(tmp_path.iterdir()) == []


# Plugins of the Trainer.


class Foreign(CheckpointIO):
    """A user's plugin, which writes a folder with the checkpoint in one of its files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        os.makedirs(path, exist_ok=True)
        torch.save(checkpoint, f"{path}/data")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(f"{path}/data", map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


PLUGINS: dict[str, Any] = {
    "async": AsyncCheckpointIO,
    "async, a user's": lambda: AsyncCheckpointIO(Foreign()),
    "Lightning's": TorchCheckpointIO,
    "a user's": Foreign,
}


def save_by_plugin(worker: int, folder: str, plugin: str, strategy: str) -> tuple[State, State]:
    chosen: Any = "resist" if strategy == "by name" else make_strategy()
    states = []
    for path in (None, f"{folder}/step=8.ckpt"):
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        options = {"callbacks": [saving], "enable_checkpointing": True} if path is None else {}
        module = Small(seed=7 if path is None else 1)
        trainer = make_trainer(chosen, max_epochs=1, plugins=[PLUGINS[plugin]()], **options)
        trainer.strategy.config = make_strategy().config
        trainer.fit(module, stream(worker, STEPS), ckpt_path=path)
        states.append(clone_state(module))
        chosen = make_strategy()
    return states[0], states[1]


PLUGGED = {"async": "by name", "a user's": "by name", "async, a user's": "an object", "Lightning's": "an object"}
"""For each plugin, how the strategy is given."""


def save_by_plugins(worker: int, folder: str) -> dict[str, tuple[State, State]]:
    return {plugin: save_by_plugin(worker, f"{folder}/{plugin}", plugin, how) for plugin, how in PLUGGED.items()}


def test_plugins_that_write_checkpoints(tmp_path: Path) -> None:
    assert PLUGGED.keys() == PLUGINS.keys()
    for found in run_trainers(save_by_plugins, 2, str(tmp_path)):
        for plugin, (unbroken, resumed) in found.items():
            assert_equal_states(resumed, unbroken, exactly=True)
            assert sorted(path.name for path in (tmp_path / plugin).iterdir()) == [
                f"step={step}.ckpt{workers}" for step in (4, 8) for workers in ("", ".workers")
            ]


# Messages.


class Fails(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise KeyError("a mistake")


def fail_and_listen(worker: int, folder: str) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    logging.captureWarnings(True)
    saving = ModelCheckpoint(folder, save_on_exception=True)
    trainer = make_trainer(make_strategy(), max_epochs=1, callbacks=[Fails(), saving], enable_checkpointing=True)
    with pytest.raises(KeyError, match="a mistake"):
        trainer.fit(Small(), stream(worker, STEPS))
    assert not {"on_exception", "_save_checkpoint", "_monitor_candidates"} & vars(saving).keys()
    return said


def test_a_checkpoint_that_is_refused_after_an_error_is_not_announced(tmp_path: Path) -> None:
    (said,) = run_trainers(fail_and_listen, 1, str(tmp_path))

    assert [line for line in said if "is not written: after an error no worker" in line]
    assert not [line for line in said if "saved checkpoint to" in line]
    assert list(tmp_path.iterdir()) == []


class StopsAndDies(L.Callback):
    """SIGTERM to worker 1, which is killed when it writes its part of the checkpoint that all save then."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 4:
            checkpoint_files.write_sealed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            os.kill(os.getpid(), signal.SIGTERM)


def stop_and_die(worker: int, folder: str) -> None:
    callbacks = [StopsAndDies(), OnExceptionCheckpoint(folder)]
    trainer = make_trainer(make_strategy(), max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Small(), stream(worker, STEPS))


def test_a_worker_that_dies_while_all_save_after_a_signal_is_named(tmp_path: Path) -> None:
    """The others ended with an error of gloo's."""
    outcome, _ = run_trainers_to_the_end(stop_and_die, 2, str(tmp_path))
    assert isinstance(outcome.error, WorkerLost)
    assert re.search(r"^worker 1 \(host .*\) ended without", str(outcome.error))
    assert not list(tmp_path.glob("*.ckpt"))


# Snapshots that cannot be written.


def snapshots_in_a_file(worker: int, folder: str, on_save_error: str) -> State:
    module = Small()
    strategy = make_strategy(snapshots=folder, on_save_error=on_save_error)
    make_trainer(strategy, max_epochs=1).fit(module, stream(worker, STEPS))
    return clone_state(module)


def fail_and_go_on(worker: int, folder: str) -> tuple[str, State]:
    with pytest.raises(CheckpointNotWritten) as caught:
        snapshots_in_a_file(worker, folder, "raise")
    return str(caught.value), snapshots_in_a_file(worker, folder, "warn")


def test_snapshots_that_cannot_be_written_end_all_workers_at_the_start_or_none(unbroken: State, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = f"{tmp_path}/file/snapshots"
    for error, state in run_trainers(fail_and_go_on, 2, folder):
        said = f"snapshots={folder!r} cannot be written (worker 0: Not a directory; worker 1: Not a directory)"
        assert said in error
        assert "on_save_error='warn'" in error
        assert_equal_states(state, unbroken, exactly=True)


def snapshots_on_a_full_disk(worker: int, folder: str) -> None:
    trainer = make_trainer(make_strategy(snapshots=folder), max_epochs=1, callbacks=[FillsTheDisk()])
    trainer.fit(Small(), stream(worker, STEPS))


def test_a_full_disk_at_a_snapshot_is_named(tmp_path: Path) -> None:
    (outcome,) = run_trainers_to_the_end(snapshots_on_a_full_disk, 1, f"{tmp_path}/s")

    assert isinstance(outcome.error, CheckpointNotWritten)
    assert "worker 0 could not write the snapshot of round 1: [Errno 27] File too large" in str(outcome.error)
    assert f"{tmp_path}/s/round=00000001/" in str(outcome.error)


# Damage.


def evaluate_damaged(worker: int, path: str) -> list[str]:
    module, errors = Small(), []
    for method in ("fit", "validate", "test", "predict"):
        trainer = make_trainer(make_strategy(), max_epochs=1)
        loader = stream(worker, STEPS) if method == "fit" else held_out(worker)
        with pytest.raises(CheckpointError) as caught:
            getattr(trainer, method)(module, loader, ckpt_path=path)
        errors.append(str(caught.value))
    return errors


def test_one_wrong_bit_of_the_model_is_found_by_whoever_loads_it(saved: Path) -> None:
    path = saved
    shutil.rmtree(f"{path}.workers")
    content = path.read_bytes()
    weight = torch.load(path, weights_only=True)["state_dict"]["net.stem.1.weight"].numpy().tobytes()
    position = content.index(weight)  # torch.load does not notice it
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert torch.load(path, weights_only=True)["global_step"] == 4

    (errors,) = run_trainers(evaluate_damaged, 1, str(path))
    assert len(errors) == 4
    for error in errors:
        assert f"{path} is damaged: its checksum is" in error


def test_a_checkpoint_without_a_seal_is_loaded(saved: Path, unbroken: State) -> None:
    torch.save(torch.load(saved, weights_only=True), saved)  # as written by a version without seals

    for state in run_trainers(resume, 2, str(saved)):
        assert_equal_states(state, unbroken, exactly=True)
    assert len(files_of(saved)) == len(torch.load(saved, weights_only=True)[CHECKPOINT_KEY]["files"]) == 2

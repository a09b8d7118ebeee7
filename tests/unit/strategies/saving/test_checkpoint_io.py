"""The model's file: written by this package, by a plugin, or by a plugin's thread."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from resist_lightning.checkpoint.files import write_sealed
from resist_lightning.checkpoint.snapshots import SnapshotFolder
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from resist_lightning.strategies.saving.checkpoint_io import (
    AtomicIO,
    base_of,
    forgive_thread,
    or_atomic,
    snapshots_at,
)


def test_a_trainer_without_a_plugin_writes_atomically() -> None:
    own = AsyncCheckpointIO(AtomicIO())
    assert isinstance(or_atomic(None), AtomicIO)
    assert isinstance(base_of(or_atomic(AsyncCheckpointIO())), AtomicIO)
    assert or_atomic(own) is own


def test_a_thread_that_has_written_the_model_removes_only_what_was_there_before(tmp_path: Path) -> None:
    folder = tmp_path / "a.ckpt.workers"
    before, own, later = (write_sealed({"round": n}, folder, f"round={n}-step=0-0-of-1") for n in range(3))
    coming = folder / ".round=2-step=0-1-of-2.pt.part"  # of a worker that is writing the next checkpoint
    coming.touch()
    for age, file in enumerate((coming, later, own, before)):
        os.utime(file, ns=(0, -age * 10**9 + 10**18))
    plugin = AsyncCheckpointIO(AtomicIO())

    assert before.exists()
    plugin.save_checkpoint({CHECKPOINT_KEY: {"files": [own.name]}}, tmp_path / "a.ckpt")
    plugin.teardown()

    assert isinstance(base_of(plugin), AtomicIO)
    assert sorted(folder.iterdir()) == sorted([own, later, coming])


def test_where_a_thread_cannot_write_the_model_no_files_of_workers_are_left(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    own, later = (write_sealed({"round": n}, tmp_path / "a.ckpt.workers", f"round={n}-step=0-0-of-1") for n in (1, 2))
    (tmp_path / ".a.ckpt.part").mkdir()  # where the model's file would be written

    for file, left in ((own, [later]), (later, None)):
        with pytest.raises(IsADirectoryError):
            AtomicIO().save_checkpoint({CHECKPOINT_KEY: {"files": [file.name]}}, path)
        assert (list(own.parent.iterdir()) if own.parent.exists() else None) == left


def test_a_thread_that_could_not_write_is_forgiven_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plugin = AsyncCheckpointIO(AtomicIO())
    with suppress(OSError):  # raised if the thread is quick
        plugin.save_checkpoint({}, tmp_path / "file" / "a.ckpt")
    with pytest.warns(UserWarning, match=r"could not be written \(.*File exists"):
        forgive_thread(plugin, wait=True)
    plugin.teardown()  # raises the stored error
    if hasattr(plugin, "_ensure_setup"):  # Lightning 2.5.0 makes no thread anew
        plugin.save_checkpoint({}, tmp_path / "a.ckpt")
        plugin.teardown()
        assert (tmp_path / "a.ckpt").exists()


def test_a_folder_is_one_of_snapshots_unless_a_plugin_writes_folders(tmp_path: Path) -> None:
    class Foreign(CheckpointIO):
        save_checkpoint = load_checkpoint = remove_checkpoint = None  # type: ignore[assignment]

    assert snapshots_at(f"file://{tmp_path}", AtomicIO()) == tmp_path
    assert snapshots_at(tmp_path, Foreign()) is None
    SnapshotFolder(tmp_path).write({}, 3, 0, 1)
    assert snapshots_at(tmp_path, Foreign()) == tmp_path
    assert snapshots_at("memory://folder", AtomicIO()) is None

"""The saver alone: one worker, and a plugin that may refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from resist_lightning import CheckpointNotWritten
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from resist_lightning.strategies.saving.checkpoint_io import AtomicIO
from resist_lightning.strategies.saving.saver import Saver


class Full(AtomicIO):
    """A disk without room."""

    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")


def save(saver: Saver, path: Path, plugin: AtomicIO, *, worker: int = 0) -> None:
    module = L.LightningModule()
    module.weight = torch.nn.Parameter(torch.ones(2))
    state = saver.take(module, None, {"round": 3, "step": 1}, AtomicIO(), interrupted=False)
    checkpoint = {"state_dict": state}
    saver.save(checkpoint, path, lambda: plugin.save_checkpoint(checkpoint, path), plugin, worker, interrupted=False)


def test_a_checkpoint_has_the_module_and_the_state_to_resume_from(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(Saver(forgiving=False), path, AtomicIO())
    found = torch.load(path, weights_only=True)
    assert found["state_dict"]["weight"].tolist() == [1, 1]
    assert found[CHECKPOINT_KEY] == {"round": 3, "step": 1}


def test_a_worker_that_has_parted_from_the_others_writes_nothing(tmp_path: Path) -> None:
    save(Saver(forgiving=False), tmp_path / "a.ckpt", AtomicIO(), worker=1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_training_or_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    with pytest.raises(CheckpointNotWritten, match="No space left"):
        save(Saver(forgiving=False), new, Full())

    saver = Saver(forgiving=True)
    save(saver, old, AtomicIO())
    with pytest.warns(UserWarning, match="No space left"):
        save(saver, new, Full())
    with pytest.warns(UserWarning, match="is kept"):
        saver.remove(old, AtomicIO(), 0, 1)
    assert old.exists()
    save(saver, new, AtomicIO())
    saver.remove(old, AtomicIO(), 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["new.ckpt"]

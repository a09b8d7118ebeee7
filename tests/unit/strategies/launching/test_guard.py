from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resist_lightning.strategies.launching.guard import Guard, how_to_resume


def test_without_a_watch_errors_pass_as_they_are():
    guard = Guard(timedelta(seconds=30))
    with pytest.raises(KeyError), guard.around():
        raise KeyError
    guard.check()
    guard.end()
    assert guard.state == "unwatched"


def test_the_newest_checkpoint_that_still_exists_is_named(tmp_path: Path):
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    for age, path in enumerate((new, old)):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    callback = SimpleNamespace(last_model_path=str(old), best_model_path=str(tmp_path / "removed.ckpt"))
    saver = SimpleNamespace(last_written="", collected=False)
    strategy = SimpleNamespace(resumer=SimpleNamespace(snapshot_folder=None), saver=saver)
    callbacks = [callback, SimpleNamespace(best_model_path=str(new))]
    trainer: Any = SimpleNamespace(checkpoint_callbacks=callbacks, strategy=strategy)
    assert how_to_resume(trainer) == f"Resume with Trainer.fit(..., ckpt_path='{new}')."
    trainer.checkpoint_callbacks = []
    assert "save_last=True" in how_to_resume(trainer)
    strategy.resumer.snapshot_folder = "snapshots"
    assert "ckpt_path='snapshots'" in how_to_resume(trainer)
    saver.collected = True  # Ray's checkpoints are elsewhere by now
    assert "FailureConfig(max_failures=...)" in how_to_resume(trainer)

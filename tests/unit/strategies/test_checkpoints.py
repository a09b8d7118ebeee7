"""Files of workers that several workers remove at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from resist_lightning.snapshots import SnapshotFolder
from resist_lightning.strategies.checkpoints import remove


def test_a_folder_that_another_worker_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda _: True)  # so it was a moment ago

    remove(tmp_path / "a.ckpt", worker=1)


def test_so_it_is_with_a_round_of_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SnapshotFolder(tmp_path)
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    monkeypatch.setattr(folder, "_rounds", lambda: [3, 2, 1])

    folder.write({}, 3, 1, 2)

    assert len(list(tmp_path.glob("round=*/worker-1-of-2.*.pt"))) == 1

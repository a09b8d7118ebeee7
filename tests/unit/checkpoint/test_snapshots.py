from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from resist_lightning.checkpoint import snapshots
from resist_lightning.checkpoint.snapshots import SnapshotFolder, needed, usable


def write(folder: SnapshotFolder, round: int, workers: int) -> None:
    for worker in range(workers):
        tensors = {"shared": torch.tensor(1.0), f"block{worker}": torch.tensor(float(round + worker))}
        folder.write({"own": {"tensors": tensors}}, round, worker, workers)


def test_the_newest_two_rounds_are_kept(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path / "s")
    for round in (5, 9, 10, 100):
        write(folder, round, 2)

    assert [(snapshot.round, sorted(snapshot.files)) for snapshot in folder.newest_first()] == [
        (100, [0, 1]),
        (10, [0, 1]),
    ]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["round=00000010", "round=00000100"]


def test_the_newest_whole_round_is_kept_where_a_worker_cannot_write(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 2)
    for round in (4, 5, 6):
        folder.write({}, round, 1, 2)  # the disk of worker 0 is full

    assert usable(folder.newest_first(), 0, 2) == [3]
    assert usable(folder.newest_first(), 1, 2) == [6, 5, 3]
    write(folder, 7, 2)
    write(folder, 8, 2)
    assert [snapshot.round for snapshot in folder.newest_first()] == [8, 7]


def test_a_worker_needs_its_own_file_or_after_another_number_of_workers_all(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 3)
    (snapshot,) = folder.newest_first()

    assert needed(snapshot, 1, 3) == [snapshot.files[1]]
    assert needed(snapshot, 1, 2) == [snapshot.files[worker] for worker in range(3)]
    snapshot.files[2].unlink()
    (snapshot,) = folder.newest_first()
    assert needed(snapshot, 1, 3) == [snapshot.files[1]]
    assert needed(snapshot, 2, 3) == needed(snapshot, 0, 2) == []


def test_damaged_rounds_are_not_usable(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 2)
    write(folder, 4, 2)
    newest = folder.newest_first()[0]
    newest.files[1].write_bytes(newest.files[1].read_bytes()[:-1])

    assert usable(folder.newest_first(), 0, 2) == [4, 3]
    assert usable(folder.newest_first(), 1, 2) == [3]
    assert usable(folder.newest_first(), 0, 1) == [3]


def test_after_a_change_of_workers_together_they_read_each_file_once_to_check_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each worker read all files of all rounds: S² times the shared tensors.
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 5)
    write(folder, 4, 5)
    checked: Counter[Path] = Counter()
    monkeypatch.setattr(snapshots, "check_sealed", lambda path: checked.update([path]))
    for worker in range(3):
        assert usable(folder.newest_first(), worker, 3) == [4, 3]
    assert len(checked) == 10
    assert set(checked.values()) == {1}


def test_a_damaged_file_makes_its_round_unusable_for_one_of_fewer_workers(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 3)
    (snapshot,) = folder.newest_first()
    for worker, path in snapshot.files.items():
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        found = [usable(folder.newest_first(), each, 2) for each in range(2)]
        assert [] in found, worker
        path.write_bytes(whole)
    assert [usable(folder.newest_first(), each, 2) for each in range(2)] == [[3], [3]]


def test_rounds_that_a_run_went_back_behind_are_forgotten(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 2)
    write(folder, 4, 2)

    folder.forget_later(3)

    assert [snapshot.round for snapshot in folder.newest_first()] == [3]


def test_removing_takes_nothing_that_is_not_a_snapshot(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    write(folder, 3, 2)
    write(folder, 4, 2)
    folder.set_agents([7])
    others = [tmp_path / "thesis.tex", tmp_path / "round=00000003" / "notes.txt"]
    for path in others:
        path.touch()

    folder.remove()

    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    for path in others:
        path.unlink()
    write(folder, 5, 2)
    (tmp_path / "round=00000003").rmdir()
    folder.remove()
    assert not tmp_path.exists()


def test_agents_are_remembered_and_a_broken_list_is_none(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path / "s")
    assert folder.agents() == []
    folder.set_agents([7, 3])
    assert folder.agents() == [3, 7]
    (tmp_path / "s" / "agents.json").write_text("{")
    assert folder.agents() == []


def test_the_agents_are_those_before_until_the_new_ones_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The list was replaced in place: a writer that was killed, or a full disk, left it empty, and every restart ended
    # with "has snapshots of a run that did not finish".
    folder = SnapshotFolder(tmp_path / "s")
    folder.set_agents([7])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", full)  # the last thing before the new list takes its name
        with pytest.raises(OSError, match="No space left"):
            folder.set_agents([7, 8])
    assert folder.agents() == [7]

    (tmp_path / "s" / ".agents.json.part").write_text("[7,")  # a writer was killed
    assert folder.agents() == [7]
    folder.remove()
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    assert SnapshotFolder(tmp_path / "missing").newest_first() == []

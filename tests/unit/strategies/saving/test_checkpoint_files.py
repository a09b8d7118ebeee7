"""Names and files of checkpoints, with a file for each worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resist_lightning.checkpoint.files import write_sealed
from resist_lightning.checkpoint.snapshots import SnapshotFolder
from resist_lightning.errors import CheckpointNotWritten, PartialModelError
from resist_lightning.strategies.saving.checkpoint_files import (
    CHECKPOINT_KEY,
    agree_on_path,
    local_path,
    read_own,
    remove,
    save_together,
)
from tests.helpers.threads import run_threads


def test_a_folder_that_another_worker_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda _: True)  # as a moment ago

    remove(tmp_path / "a.ckpt", rank=1, members=1)


def test_so_it_is_with_a_round_of_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SnapshotFolder(tmp_path)
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    monkeypatch.setattr(folder, "_rounds", lambda: [3, 2, 1])

    folder.write({}, 3, 1, 2)

    assert len(list(tmp_path.glob("round=*/worker-1-of-2.*.pt"))) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/b.ckpt", "/a/b.ckpt"),
        ("file:///a/b.ckpt", "/a/b.ckpt"),
        ("file:/a/b.ckpt", "/a/b.ckpt"),
        ("local:///a/b.ckpt", "/a/b.ckpt"),
        ("~/b.ckpt", os.path.expanduser("~/b.ckpt")),
        ("b.ckpt", os.path.join(os.getcwd(), "b.ckpt")),
        ("memory://a/b.ckpt", None),
        ("filecache::memory://a/b.ckpt", None),
    ],
)
def test_the_local_path_of_a_url(path: str, expected: str | None) -> None:
    assert local_path(path) == (None if expected is None else Path(expected))


@pytest.mark.parametrize("prefix", ["", "../elsewhere/", "{folder}/elsewhere/"])
def test_a_checkpoint_reads_no_files_but_those_beside_it(prefix: str, tmp_path: Path) -> None:
    inside = write_sealed({"inside": 1}, tmp_path / "a.ckpt.workers", "stem")
    write_sealed({"inside": 1}, tmp_path / "elsewhere", "stem")
    (tmp_path / "elsewhere" / inside.name).write_bytes(b"of another one")

    state = {"files": [prefix.format(folder=tmp_path) + inside.name]}
    assert read_own(state, f"file://{tmp_path}/a.ckpt", 0) == {"inside": 1}


def test_all_workers_take_worker_0s_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"name this checkpoint differently \(.*/0\.ckpt, .*/1\.ckpt\)"):
        agreed = run_threads(lambda collective: agree_on_path(f"{tmp_path}/{collective.worker}.ckpt", collective), 2)[0]
    assert agreed == [f"{tmp_path}/0.ckpt"] * 2


@pytest.mark.parametrize(("error", "kept"), [(OSError(28, "No space left"), True), (TypeError("no pickle"), False)])
def test_what_went_wrong_on_worker_0_is_told_to_all(error: Exception, kept: bool, tmp_path: Path) -> None:
    def write() -> None:
        raise error

    def save(collective: Any) -> Exception | None:
        checkpoint: dict[str, Any] = {CHECKPOINT_KEY: {"round": 1, "step": 2}}
        try:
            save_together(checkpoint, {"worker": collective.worker}, tmp_path / "a.ckpt", write, collective)
        except Exception as failure:  # noqa: BLE001
            return failure
        return None

    mine, theirs = run_threads(save, 2)[0]

    assert "worker 0: " in str(theirs)
    assert str(error.args[-1]) in str(theirs)
    assert isinstance(theirs, CheckpointNotWritten) == kept
    assert isinstance(mine, CheckpointNotWritten) if kept else mine is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hyper_parameters", "told"),
    [
        ({"lr": 0.1, "net": nn.Linear(1, 1)}, r"hyperparameters net are modules.*ignore=\['net'\].*only a part"),
        ({"lr": 0.1}, "Something in the checkpoint beside its state_dict .*only a part"),
    ],
)
def test_a_network_in_a_checkpoint_beside_its_weights_is_named(
    hyper_parameters: dict[str, Any], told: str, tmp_path: Path
) -> None:
    def write() -> None:
        raise PartialModelError("worker 0 has only a part of the network")

    def save(collective: Any) -> str:
        with pytest.raises((PartialModelError, RuntimeError), match=told) as caught:
            save_together({"hyper_parameters": hyper_parameters}, None, tmp_path / "a.ckpt", write, collective)
        return caught.typename

    assert run_threads(save, 2)[0] == ["PartialModelError", "RuntimeError"]

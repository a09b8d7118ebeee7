from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from resist_lightning.errors import CheckpointError
from resist_lightning.files import read_file, read_sealed, write_file, write_sealed

STATE = {"weights": torch.arange(1000.0), "list": [1, "two", None], "nested": {"three": torch.ones(2, 3)}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_sealed(STATE, tmp_path / "new" / "folder", "worker-0")

    found = read_sealed(path)

    assert path.name.startswith("worker-0.")
    assert torch.equal(found["weights"], STATE["weights"])
    assert found["list"] == STATE["list"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing beside it


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_wrong_bit_anywhere_is_found(position: int, tmp_path: Path) -> None:
    path = write_sealed(STATE, tmp_path, "a")
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="is damaged: its checksum is"):
        read_sealed(path)


class Breaks:
    """Fails when it is written."""

    def __reduce__(self) -> str:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_file({"generation": 1}, path)

    with pytest.raises(OSError, match="No space left"):
        write_file({"big": torch.zeros(10_000), "breaks": Breaks()}, path)

    assert read_file(path) == {"generation": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


class Foreign:
    """A user's class."""


def test_objects_are_not_loaded(tmp_path: Path) -> None:
    write_file({"object": Foreign()}, tmp_path / "a")

    with pytest.raises(CheckpointError, match="UnpicklingError"):
        read_file(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"not a checkpoint", "no checkpoint of torch"),
        (b"PK\x03\x04half", "cut off after 8 bytes"),
    ],
)
def test_files_of_other_kinds_are_explained(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


def test_a_folder_and_a_missing_file_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_file(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_file(tmp_path / "missing")


class Meets:
    """Pickled only when another one is being pickled, too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __reduce__(self) -> Any:
        self.barrier.wait(10)
        return OrderedDict, ()


def test_two_hosts_whose_processes_have_the_same_number_write_to_one_folder(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)

    def write(worker: int) -> None:
        write_sealed([Meets(barrier), worker], tmp_path, f"worker-{worker}")

    threads = [threading.Thread(target=write, args=(worker,)) for worker in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    files = sorted(tmp_path.iterdir())
    assert [read_sealed(file)[1] for file in files] == [0, 1]

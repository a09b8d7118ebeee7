from __future__ import annotations

import io
import os
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from resist_lightning.checkpoint.files import (
    check_seal,
    read_file,
    read_sealed,
    to_sealed_bytes,
    write_file,
    write_sealed,
)
from resist_lightning.errors import CheckpointError

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


# The seal of a model file.


def sealed(path: Path) -> bytes:
    write_file(STATE, path)
    return path.read_bytes()


def is_refused(content: bytes, sealed: bool = True) -> bool:
    try:
        check_seal(io.BytesIO(content), "a.ckpt", sealed=sealed)
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001 - by whomever
        return True
    return False


def test_a_sealed_file_is_any_torch_file(tmp_path: Path) -> None:
    content = sealed(tmp_path / "a")

    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}):
        assert torch.equal(torch.load(tmp_path / "a", **options)["weights"], STATE["weights"])
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.testzip() is None
    assert not is_refused(content)
    assert not is_refused(to_sealed_bytes(STATE))


def test_one_wrong_bit_in_any_byte_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    content = sealed(tmp_path / "a")

    missed = []
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        if not is_refused(bytes(changed)):
            missed.append(position)
    assert missed == []


@pytest.mark.parametrize("cut", [1, 5, 30, 31, 32, 53, 60, 1000])
def test_a_sealed_file_that_is_cut_off_is_found(cut: int, tmp_path: Path) -> None:
    assert is_refused(sealed(tmp_path / "a")[:-cut])
    assert is_refused(sealed(tmp_path / "a") + bytes(cut))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_without_a_seal_passes(zipped: bool) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=zipped)

    assert not is_refused(buffer.getvalue())
    assert not is_refused(buffer.getvalue() + b"what a user's plugin adds", sealed=False)


def test_a_disk_that_refuses_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.a\.part'"):
        write_file(STATE, tmp_path / "a")


class Breaks:
    """An object that fails when it is written."""

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
        (b"not a checkpoint", "not a torch checkpoint"),
        (b"PK\x03\x04half", "truncated at 8 bytes"),
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
    """Pickled only while another one is being pickled, too."""

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

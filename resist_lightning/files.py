"""Files that are there whole or not at all, and errors that say what is wrong with one."""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from resist_lightning.errors import CheckpointError

CHUNK_BYTES = 1 << 22
SEALED_SUFFIX = ".pt"

_TORCH_WRITER = "inline_container"  # in the text of its errors

_UNREADABLE = {
    FileNotFoundError: "there is no such file.",
    IsADirectoryError: "it is a folder; name a file in it.",
    PermissionError: "this user may not read it; change its permissions, or run as its owner.",
}


def write_file(state: object, path: Path) -> None:
    """Write ``state`` with torch.save to ``path``, atomically: whoever is killed on the way leaves what was there.

    Raises:
        OSError: if it cannot be written; then nothing is left of it.
    """
    _write(state, path.parent, path.name, lambda _: path.name)


def write_sealed(state: object, folder: Path, stem: str) -> Path:
    """Write ``state`` to a file in ``folder`` that carries its checksum in its name, ``STEM.CRC32.pt``; atomically.

    Returns:
        The file's path.

    Raises:
        OSError: if it cannot be written; then nothing is left of it.
    """
    return _write(state, folder, stem, lambda crc: f"{stem}.{crc:08x}{SEALED_SUFFIX}")


def read_sealed(path: Path) -> Any:
    """Read a file of :func:`write_sealed`, with ``weights_only=True``.

    Raises:
        CheckpointError: if it cannot be read, or its content is not what its name says.
    """
    expected = path.name.removesuffix(SEALED_SUFFIX).rpartition(".")[2]
    try:
        found = f"{_checksum(path):08x}"
    except OSError as error:
        raise CheckpointError(explain(path, error)) from error
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: its checksum is {found} and should be {expected} ({path.stat().st_size} bytes)."
        )
    return read_file(path)


def read_file(path: Path) -> Any:
    """Read a file of torch.save on the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: if it cannot be read; the message says what the file is.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(explain(path, error)) from error


def refused(parts: Mapping[str, Any]) -> list[str]:
    """The names of those parts that :func:`read_file` would refuse, with the kind of object that it stumbles over."""
    found = []
    for name, part in parts.items():
        buffer = io.BytesIO()
        torch.save(part, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, a resumed run would end with it
            kind = re.search(r"GLOBAL ([\w.]+)", str(error))
            found.append(f"{name!r} ({kind[1] if kind else type(error).__name__})")
    return found


def explain(path: Path, error: BaseException) -> str:
    """What a file that could not be read is, and what to do."""
    return f"{path} cannot be loaded: {_what_is_wrong(path, error)}"


def _what_is_wrong(path: Path, error: BaseException) -> str:
    for kind, what in _UNREADABLE.items():
        if isinstance(error, kind):
            return what
    if isinstance(error, OSError):
        return f"{error}."
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
    if not size:
        return "it is empty. Whoever wrote it was stopped or had no space left; use the checkpoint before it."
    if start[:2] != b"PK":
        return f"it is no checkpoint of torch (it begins with {start!r}). Name the file that the Trainer has written."
    if not zipfile.is_zipfile(path):
        return (
            f"it is cut off after {size} bytes. It was not copied or written to the end; use the checkpoint before it."
        )
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _write(state: object, folder: Path, stem: str, name: Callable[[int], str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{stem}.part"  # only one worker writes it; processes of two hosts may have the same number
    try:
        with part.open("wb") as file:
            checksummed = _Checksummed(file)
            try:
                torch.save(state, cast(BinaryIO, checksummed))
            except RuntimeError as error:
                raise _behind(error) or checksummed.error or error from None
            file.flush()
            os.fsync(file.fileno())
        path = folder / name(checksummed.crc)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def _behind(error: BaseException) -> BaseException | None:
    """What torch's writer hides when, after an error, it cannot end the file; None if it does not know either."""
    found: BaseException | None = error
    while found is not None and _TORCH_WRITER in str(found):
        found = found.__context__
    return found


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


class _Checksummed:
    """A file that adds up the checksum of what is written to it; torch.save writes from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.crc = 0
        self.error: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

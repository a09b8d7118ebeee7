"""Writes files of torch.save atomically and with a checksum, and explains why one cannot be read."""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from resist_lightning.checkpoint.atomic import write_atomically
from resist_lightning.errors import CheckpointError

CHUNK_BYTES = 1 << 22
SEALED_SUFFIX = ".pt"

_TORCH_WRITER = "inline_container"  # in the text of its errors

# torch.save writes a zip file. Its last record may be followed by a comment, which all readers of zip files skip: the
# seal is stored there. The record's last two bytes are the comment's length.
_ZIP_START, _ZIP_END, _ZIP_END_BYTES, _LENGTH_BYTES = b"PK", b"PK\x05\x06", 22, 2
_SEAL = re.compile(rb"resist-lightning crc32=([0-9a-f]{8})")
_SEAL_BYTES = len(b"resist-lightning crc32=00000000")
_SEAL_LENGTH = _SEAL_BYTES.to_bytes(_LENGTH_BYTES, "little")

_UNREADABLE = {
    FileNotFoundError: "there is no such file.",
    IsADirectoryError: "it is a folder; name a file in it.",
    PermissionError: "this user has no permission to read it; change its permissions, or run as its owner.",
}


def write_file(state: object, path: Path) -> None:
    """Write ``state`` with torch.save to ``path``, atomically: a process killed meanwhile leaves the earlier file.

    The file carries a checksum of itself, its seal, at its end: torch.load reads it as any other one, and
    :func:`check_seal` finds damage.

    Raises:
        OSError: if it cannot be written; then nothing is left of it.
    """

    def fill(file: BinaryIO) -> str:
        _append_seal(file, _save(state, file))
        return path.name

    write_atomically(path.parent, path.name, fill)


def to_sealed_bytes(state: object) -> bytes:
    """The content of a file of :func:`write_file`."""
    buffer = io.BytesIO()
    _append_seal(buffer, _save(state, buffer))
    return buffer.getvalue()


def check_seal(file: IO[bytes], path: object, *, sealed: bool) -> None:
    """Check that a file is as :func:`write_file` wrote it. A file of torch.save, without a seal, passes.

    Args:
        file: open for reading, at any position; it is left at its start.
        path: its name, for the error.
        sealed: whether only torch.save or :func:`write_file` can have written it, so that anything else at the end of
            a zip file is damage.

    Raises:
        CheckpointError: if the file is damaged.
    """
    file.seek(0)
    starts_as_zip = file.read(len(_ZIP_START)) == _ZIP_START
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_END_BYTES - _SEAL_BYTES))
    tail = file.read()
    seal = _SEAL.fullmatch(tail[-_SEAL_BYTES:])
    if seal is not None:
        found, expected = _checksum_before_seal(file, size), int(seal[1], 16)
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: its checksum is {found:08x} and should be {expected:08x} ({size} bytes). Use "
                "another checkpoint, or copy this one again."
            )
    elif sealed and starts_as_zip and not _ends_as_torch_ends(tail):
        raise CheckpointError(
            f"{path} is truncated at {size} bytes, or damaged at its end, where its checksum should be. Use another "
            "checkpoint, or copy this one again."
        )
    file.seek(0)


def write_sealed(state: object, folder: Path, stem: str) -> Path:
    """Write ``state`` to a file in ``folder`` that carries its checksum in its name, ``STEM.CRC32.pt``; atomically.

    Returns:
        The file's path.

    Raises:
        OSError: if it cannot be written; then nothing is left of it.
    """
    return write_atomically(folder, stem, lambda file: f"{stem}.{_save(state, file):08x}{SEALED_SUFFIX}")


def read_sealed(path: Path, *, mapped: bool = False) -> Any:
    """Check a file of :func:`write_sealed`, and read it as :func:`read_file` does.

    Raises:
        CheckpointError: if it cannot be read, or its content does not match the checksum in its name.
    """
    check_sealed(path)
    return read_file(path, mapped=mapped)


def check_sealed(path: Path) -> None:
    """Check that the content of a file of :func:`write_sealed` matches the checksum in its name.

    Raises:
        CheckpointError: if it does not, or cannot be read.
    """
    _, _, expected = path.name.removesuffix(SEALED_SUFFIX).rpartition(".")
    try:
        found = f"{_checksum(path):08x}"
    except OSError as error:
        raise CheckpointError(explain(path, error)) from error
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: its checksum is {found} and should be {expected} ({path.stat().st_size} bytes)."
        )


def read_file(path: Path, *, mapped: bool = False) -> Any:
    """Read a file of torch.save on the CPU, with ``weights_only=True``.

    Args:
        path: of the file.
        mapped: read the values of a tensor only when they are used. The file must stay until then.

    Raises:
        CheckpointError: if it cannot be read; the message says why.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise CheckpointError(explain(path, error)) from error


def check_loadable(parts: Mapping[str, Any]) -> None:
    """Check that :func:`read_file` will accept these parts: found out at the first save, not at a resume.

    Raises:
        ValueError: if parts cannot be loaded; the message names each, with the class that was refused.
    """
    refused = []
    for name, part in parts.items():
        buffer = io.BytesIO()
        # Without tensors, which are never refused, and may be as large as this worker's whole part.
        torch.save(tree_map(lambda value: None if type(value) is Tensor else value, part), buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, a resumed run would end with it
            # Torch names the class that it refuses in this way.
            match = re.search(r"GLOBAL ([\w.]+)", str(error))
            kind = match[1] if match else type(error).__name__
            refused.append(f"{name!r} ({kind})")
    if refused:
        raise ValueError(
            f"checkpoints and snapshots are loaded with weights_only=True, which refuses {', '.join(refused)}. Keep "
            "only numbers, strings, lists, dicts and tensors in the state of optimizers, schedulers, callbacks and "
            "loaders and in `on_save_checkpoint`."
        )


def explain(path: Path, error: BaseException) -> str:
    """The message for a file that could not be read: why, and what to do."""
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
        return "it is empty: its writer was stopped or ran out of disk space. Use the previous checkpoint."
    if start[:2] != b"PK":
        return f"it is not a torch checkpoint (it begins with {start!r}). Give a file that the Trainer wrote."
    if not zipfile.is_zipfile(path):
        return f"it is truncated at {size} bytes: copying or writing it did not finish. Use the previous checkpoint."
    lines = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _save(state: object, file: BinaryIO) -> int:
    """Write ``state`` with torch.save; returns the checksum."""
    checksummed = _Checksummed(file)
    try:
        torch.save(state, cast(BinaryIO, checksummed))
    except RuntimeError as error:
        raise _behind(error) or checksummed.error or error from None
    return checksummed.crc


def _append_seal(file: IO[bytes], crc: int) -> None:
    """Write the seal behind a zip file of torch.save with this checksum, as its comment."""
    file.seek(-_LENGTH_BYTES, os.SEEK_END)
    file.write(_SEAL_LENGTH)
    file.write(b"resist-lightning crc32=%08x" % crc)


def _checksum_before_seal(file: IO[bytes], size: int) -> int:
    """The checksum of a sealed file as torch.save wrote it: without the seal, whose length was zero then."""
    crc = 0
    left = size - _SEAL_BYTES - _LENGTH_BYTES
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    length = file.read(_LENGTH_BYTES)
    written = bytes(_LENGTH_BYTES) if length == _SEAL_LENGTH else length
    return zlib.crc32(written, crc)


def _ends_as_torch_ends(tail: bytes) -> bool:
    end = tail[-_ZIP_END_BYTES:]
    return end.startswith(_ZIP_END) and end.endswith(bytes(_LENGTH_BYTES))


def _behind(error: BaseException) -> BaseException | None:
    """The error that torch's writer hides when it cannot end the file after it; None if there is none."""
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
    """A file that computes the checksum of the data written to it; torch.save writes from front to back."""

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

"""Writes files that are whole or absent: a partial file is written first, and then takes the name in one step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_text(text: str, path: Path) -> None:
    """Write ``text`` to ``path``, atomically: a process killed meanwhile leaves the earlier file.

    Raises:
        OSError: if it cannot be written; then the earlier file stays.
    """

    def fill(file: BinaryIO) -> str:
        file.write(text.encode())
        return path.name

    write_atomically(path.parent, path.name, fill)


def write_atomically(folder: Path, stem: str, fill: Callable[[BinaryIO], str]) -> Path:
    """Write a file to ``folder``, which is made if there is none.

    Args:
        folder: of the file.
        stem: names the partial file.
        fill: writes the content, and returns the name of the file.

    Returns:
        The file's path.

    Raises:
        OSError: if it cannot be written; then nothing is left of it, and an earlier file stays.
    """
    # Named without the process number, which another host may have too; only one worker writes the file.
    part = part_of(folder / stem)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            name = fill(file)
            # Before the rename, or a power failure could leave the new name with an empty file.
            file.flush()
            os.fsync(file.fileno())
        path = folder / name
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # it is no folder, or not writable
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(part)  # the error of a full disk names no file
        raise
    return path


def part_of(path: Path) -> Path:
    """The partial file of a path."""
    return path.with_name(f".{path.name}.part")

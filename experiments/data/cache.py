"""Lists the files of a folder with a sub-folder per class, and caches their decoded content in a mapped file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Listing(NamedTuple):
    """Files below a folder with one sub-folder per class, sorted, with the number of their class."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def fingerprint(self, how: object) -> str:
        """A hash that changes with any file, and with ``how`` it is decoded."""
        digest = hashlib.sha256(f"{self.folder.resolve()} {how}".encode())
        for path in self.files:
            status = path.stat()
            digest.update(f"{path.relative_to(self.folder)} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]


def list_files(folder: Path, classes: Sequence[str], suffixes: Collection[str], missing: str) -> Listing:
    """The files of ``folder/<class>/*`` with these endings.

    Raises:
        ValueError: a class without a file; ``missing`` is the message, with a place for the class's folder.
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in suffixes)
        if not own:
            raise ValueError(missing.format(folder / name))
        files += own
        labels += [label] * len(own)
    return Listing(folder, tuple(classes), tuple(files), tuple(labels))


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of the first call of ``make`` for this path; tensors are mapped from the file, not read.

    Workers of one host share the pages.
    """
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be writing the same file: the rename makes it appear whole, whichever is first.
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(made, draft)
        draft.replace(path)
    stored: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    return stored

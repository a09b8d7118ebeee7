"""What is decoded once and then mapped from a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returned when it was first called for this path; tensors are mapped from the file, not read.

    Workers of one host share the pages.
    """
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be writing the same file: the rename makes it appear whole, whoever is first.
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(made, draft)
        draft.replace(path)
    stored: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    return stored

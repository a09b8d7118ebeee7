"""Writes and reads result files: JSON Lines with the measurements, the settings and the machine.

The first line has the machine, the settings and all single values; every other line is one row::

    {"machine": {...}, "settings": {...}}
    {"rows": {...}}
    {"rows": {...}}
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch

ROOT = Path(__file__).resolve().parents[2]
LONGEST_TEXT = 600


def write_record(path: Path, content: Mapping[str, Any], **machine: str | None) -> Path:
    """Write measurements into a result file, with hardware and versions.

    Args:
        path: the file.
        content: the measurements.
        machine: more about the machine. A given ``gpu`` keeps this process, which may fork more, from using the GPU.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if "gpu" not in machine:
        machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    stamp = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        **machine,
    }
    path.write_text(as_lines({"machine": stamp, **content}))
    print(f"wrote {path}")
    return path


def as_lines(content: Mapping[str, Any]) -> str:
    """The text of a result file, which :func:`read_record` reads."""
    lists = {key: value for key, value in content.items() if _is_list_of_rows(value)}
    head = {key: value for key, value in content.items() if key not in lists}
    rows = [{key: row} for key, value in lists.items() for row in value]
    return "".join(json.dumps(line) + "\n" for line in [head, *rows])


def read_record(path: Path) -> dict[str, Any]:
    """The content of a result file."""
    head, *rows = map(json.loads, path.read_text().splitlines())
    content: dict[str, Any] = dict(head)
    for line in rows:
        for key, row in line.items():
            content.setdefault(key, []).append(row)
    return content


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


class Hide(Protocol):
    """Replaces values of this machine in a text, and shortens it to its beginning or its ``end``."""

    def __call__(self, text: str, *, end: bool = False) -> str: ...


def hiding(folder: Path) -> Hide:
    """The `Hide` for texts of processes that ran in ``folder``."""
    known = {str(folder): "FOLDER", str(ROOT): "ROOT", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON"}
    known[socket.gethostname()] = "HOST"

    def hide(text: str, *, end: bool = False) -> str:
        for value, name in known.items():
            text = text.replace(value, name)
        return text[-LONGEST_TEXT:] if end else text[:LONGEST_TEXT]

    return hide

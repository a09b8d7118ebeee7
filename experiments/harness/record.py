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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch


def write_record(path: Path, content: Mapping[str, Any], **machine: str | None) -> Path:
    """Write what was measured into a result file, with hardware and versions; ``machine`` is more about the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
    """What a result file says."""
    head, *rows = map(json.loads, path.read_text().splitlines())
    content: dict[str, Any] = dict(head)
    for line in rows:
        for key, row in line.items():
            content.setdefault(key, []).append(row)
    return content


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)

"""Result files: what was measured, on what."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import lightning
import torch


def write_record(path: Path, content: dict[str, Any], **machine: str | None) -> Path:
    """Write a result file, with hardware and versions.

    Args:
        path: the file.
        content: what was measured.
        machine: more about the machine.
    """
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
    path.write_text(json.dumps({"machine": stamp, **content}, indent=1) + "\n")
    print(f"wrote {path}")
    return path

"""Result files: what was measured, on what."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import lightning
import torch

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, content: dict[str, Any]) -> Path:
    """Write ``results/NAME.json``, with hardware and versions."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **content}, indent=1) + "\n")
    print(f"wrote {path}")
    return path

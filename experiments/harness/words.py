"""Numbers with their units, as tables and pictures show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRATEGY_WORDS = {
    "resist": "ResIST", "ist": "IST", "auxnet": "AuxNet", "local_sgd": "Local SGD", "ddp": "DDP", "single": "One process",
}  # fmt: skip


def strategy_in_words(name: str) -> str:
    return STRATEGY_WORDS.get(name, name)


def run_in_words(results: Mapping[str, Any]) -> str:
    """The strategy and the workers of a run: ``ResIST, 2 workers``."""
    name = strategy_in_words(results["strategy"])
    workers = results["workers"]
    return name if workers == 1 else f"{name}, {workers} workers"


def bytes_in_words(count: float) -> str:
    """Decimal: ``87.7 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            scaled = count / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{count:.0f} B"


def seconds_in_words(seconds: float) -> str:
    """``1.25 s``, ``75.0 s``, ``5 min 3 s``."""
    if seconds >= 120:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"

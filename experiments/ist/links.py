"""The tables of IST over links: those of experiments/links and experiments/time_to_accuracy, of its own results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.links.tables import links_bytes, links_claim, links_speed
from experiments.time_to_accuracy.tables import time_to_accuracy, time_to_accuracy_claim

RESULTS = Path(__file__).parent / "results"
MADE = (links_claim, links_speed, links_bytes, time_to_accuracy_claim, time_to_accuracy)

TABLES: dict[str, Callable[[], str]] = {f"ist_{make.__name__}": partial(make, RESULTS) for make in MADE}

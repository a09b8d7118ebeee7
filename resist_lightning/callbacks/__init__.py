"""Callbacks: a monitor of rounds, different seeds per worker, and a marker for evaluators. They send nothing."""

from resist_lightning.callbacks.end_marker import EndMarker
from resist_lightning.callbacks.round_monitor import SUMMARY_FILE, RoundMonitor
from resist_lightning.callbacks.seed_per_worker import SeedPerWorker

__all__ = ["SUMMARY_FILE", "EndMarker", "RoundMonitor", "SeedPerWorker"]

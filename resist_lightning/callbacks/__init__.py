"""Callbacks for the strategies: a monitor of rounds, and different seeds per worker. They send nothing."""

from resist_lightning.callbacks.round_monitor import SUMMARY_FILE, RoundMonitor
from resist_lightning.callbacks.seed_per_worker import SeedPerWorker

__all__ = ["SUMMARY_FILE", "RoundMonitor", "SeedPerWorker"]

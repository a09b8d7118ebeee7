"""Runs with this package: training, evaluation and reports. Nothing under ``resist_lightning`` imports it."""

"""Checkpoints, snapshots and restarts."""

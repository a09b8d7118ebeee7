"""Checkpoint and snapshot files, each whole or absent."""

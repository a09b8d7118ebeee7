"""Starts the workers, watches them, and stops them together."""

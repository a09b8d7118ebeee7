"""Checks that workers agree; they stop if not."""

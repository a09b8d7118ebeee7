"""Starts the workers, and ends them."""

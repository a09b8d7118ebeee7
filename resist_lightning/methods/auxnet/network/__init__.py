"""Cuts a network into stages, and makes the auxiliary networks."""

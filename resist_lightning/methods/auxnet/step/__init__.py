"""The training step of a stage."""

"""What a worker sees of the training data."""

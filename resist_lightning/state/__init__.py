"""What a worker has, as tensors; sends nothing."""

"""A worker's tensors, optimizer state, batch norm and random state; sends nothing."""

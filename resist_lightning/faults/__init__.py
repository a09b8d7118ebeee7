"""Detection of lost workers."""

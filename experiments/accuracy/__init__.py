"""Accuracy of ResIST beside one process, DDP and local SGD on equal samples, and the paper's ablations."""

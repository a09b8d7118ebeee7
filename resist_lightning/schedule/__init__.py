"""Lengths of rounds, partitions and transfers: pure functions, standard library only."""

"""When a round ends, and who holds what in it: pure functions, standard library only."""

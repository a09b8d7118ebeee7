"""The round loop of a worker, free of any framework."""

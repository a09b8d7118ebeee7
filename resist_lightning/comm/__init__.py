"""Communication between workers: every byte that a worker sends goes through here."""

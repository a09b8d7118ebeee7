"""Every byte that a worker sends goes through here."""

"""What a method is, and the three methods."""

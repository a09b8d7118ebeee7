"""The interface of a method, and the three methods."""

"""Finds the hidden neurons of a network by tracing it."""

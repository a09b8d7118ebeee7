"""Worker processes in network namespaces, joined by links of chosen bandwidth."""

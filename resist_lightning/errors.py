"""The errors of this package. Standard library only."""

from __future__ import annotations


class BlockSelectionError(ValueError):
    """The blocks to partition cannot be chosen as asked; the message lists the candidates."""


class WorkersDisagree(RuntimeError):
    """Workers came to a sync in different states; continuing would mix their weights."""


class PartialModelError(RuntimeError):
    """Something needs the full model where a worker holds only a part of it."""

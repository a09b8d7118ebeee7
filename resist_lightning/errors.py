"""The errors of this package, and helpers for messages about processes and errors. Standard library only."""

from __future__ import annotations


def process_name(rank: int, members: int) -> str:
    """A process in messages: ``worker 1``, or ``worker 1 (rank 3)`` where workers have several members."""
    worker = rank // members
    return f"worker {worker}" if members == 1 else f"worker {worker} (rank {rank})"


class BlockSelectionError(ValueError):
    """The blocks to partition cannot be chosen as asked; the message lists the candidates."""


class LayerSelectionError(ValueError):
    """The hidden neurons of a network cannot be dealt out as asked; the message says which, why, and the way out."""


class StageSelectionError(ValueError):
    """The network cannot be cut into stages as asked; the message says why, where it can be cut, and the way out."""


class WorkersDisagree(RuntimeError):
    """Workers came to a sync in different states; continuing would mix their weights."""


class NotFinite(RuntimeError):
    """A worker has NaN or infinity in tensors to be averaged; the message says which, where and when."""


class PartialModelError(RuntimeError):
    """Something needs the full model where a worker holds only a part of it."""


class WorkerLost(RuntimeError):
    """A worker died, failed, froze or cannot be reached; the message says which, where, and how to resume."""


class CheckpointError(ValueError):
    """A file to resume from cannot be used; the message says why, and what to do."""


class CheckpointNotWritten(RuntimeError):
    """A checkpoint could not be written; the one before it is still there."""


def first_line(text: str, longest: int = 300) -> str:
    """The first line of another library's error, without its full stop; shortened, never empty."""
    line = text.strip().partition("\n")[0].rstrip(" .")
    return line[:longest] or "without a reason"

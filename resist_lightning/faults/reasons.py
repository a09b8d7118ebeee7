"""Classifies errors and exit codes: which of them tell of a lost worker. Standard library only."""

from __future__ import annotations

import signal

_BROKEN = ("gloo/", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "nccl")
# Errors of NCCL that this worker alone has caused.
_OWN = ("out of memory", "duplicate gpu", "invalid usage", "invalid argument", "unhandled cuda error")
_TIMED_OUT = ("timed out", "timeout")


def is_broken_connection(text: str) -> bool:
    """Whether the text of a RuntimeError is torch.distributed's, about a broken or timed-out connection."""
    lower = text.lower()
    return any(word in lower for word in _BROKEN) and not any(word in lower for word in _OWN)


def timed_out(text: str) -> bool:
    """Whether the text of an error tells of a timeout."""
    return any(word in text.lower() for word in _TIMED_OUT)


def name_of_exit(code: int) -> str:
    """A process's exit code in words, e.g. ``was killed by signal 9 (SIGKILL)``."""
    if code >= 0:
        return f"ended with exit code {code} without reporting an error"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"

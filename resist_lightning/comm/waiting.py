"""Waits for operations of torch.distributed such that a lost worker raises an error instead of a hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

_POLL_SECONDS = 0.0005  # an NCCL operation between hosts takes as long
_READING_AN_END = timedelta(seconds=10)  # no wait: the operation has ended

_checks: list[Callable[[], None]] = []


class Operation(Protocol):
    """A handle of a started torch.distributed operation."""

    def is_completed(self) -> bool:
        """Whether it has ended, also with an error."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Wait for its end; raises its error."""


def check_while_waiting(check: Callable[[], None]) -> None:
    """Call ``check`` repeatedly while this process waits in :func:`wait_polling`; it may raise."""
    _checks.append(check)


def forget_check(check: Callable[[], None]) -> None:
    """Undo :func:`check_while_waiting`."""
    if check in _checks:
        _checks.remove(check)


def wait_polling(operations: Sequence[Operation]) -> None:
    """Wait on the host until NCCL has executed operations.

    NCCL's own wait returns at once and lets the GPU wait: an operation that fails later leaves meaningless numbers, and
    reading them waits for a lost worker for ever.

    Raises:
        RuntimeError: the error of an operation.
        Exception: the error of a check.
    """
    for operation in operations:
        while not operation.is_completed():
            for check in tuple(_checks):
                check()
            time.sleep(_POLL_SECONDS)
        # Raises the operation's error only with a timeout.
        operation.wait(_READING_AN_END)

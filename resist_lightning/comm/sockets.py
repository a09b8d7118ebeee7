"""Cuts the group's connections when a worker is lost: gloo has no other way to wake a thread that waits in it.

Tried with torch 2.15: ``ProcessGroup.abort`` and ``shutdown``, of the group and of its backend, and
``destroy_process_group`` return at once from another thread, and the waiting thread goes on waiting. A connection that
is shut down looks to gloo like a peer that died, and every pending call raises. Standard library only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_of_group: set[str] = set()
_recorded: set[str] = set()


@contextmanager
def recording_group(*, add: bool = False) -> Iterator[None]:
    """Record the connections that are made inside as the group's; those of an earlier group are forgotten.

    Args:
        add: keep those recorded earlier, as for subgroups of the group.
    """
    made: set[str] = set()
    with recording(made):
        yield
    if not add:
        _of_group.clear()
    _of_group.update(made)


@contextmanager
def recording(made: set[str]) -> Iterator[None]:
    """Add the names of the sockets that are made inside to ``made``, after an error too."""
    before = open_sockets()
    try:
        yield
    finally:
        new = open_sockets() - before
        made.update(new)
        _recorded.update(new)


def close_inherited() -> None:
    """In a forked process: close all sockets that were recorded in the training process.

    Else its peers would not see them closed when it is killed, and its port would stay taken.
    """
    found = _sockets()
    with suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        for name in _recorded & set(found):
            # Not closed: an object that still has the descriptor's number would later close whatever has it then.
            os.dup2(nothing, found[name])
        os.close(nothing)


def cut_connections(made: set[str] | None = None) -> int:
    """Shut down the connections of those names that are still open, by default the group's; from any thread.

    Returns:
        The number of connections that were shut down: none without /proc (Linux has it), or where the group made them
        later (NCCL, and gloo with ``TORCH_GLOO_LAZY_INIT``).
    """
    names = _of_group if made is None else made
    cut = 0
    for name, descriptor in _sockets().items():
        if name not in names:
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            # Raises for a listening socket: gloo ends the process if that is shut down.
            connection.getpeername()
            connection.shutdown(socket.SHUT_RDWR)
            cut += 1
    return cut


def open_sockets() -> set[str]:
    """The names of the sockets of this process that are open now."""
    return set(_sockets())


def _sockets() -> dict[str, int]:
    """The sockets of this process, by a name that stays unique while they are open."""
    found = {}
    with suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # closed meanwhile
                name = os.readlink(f"/proc/self/fd/{descriptor}")
                if name.startswith("socket:"):
                    found[name] = int(descriptor)
    return found

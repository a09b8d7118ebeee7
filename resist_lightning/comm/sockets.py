"""Cuts the group's connections when a worker is lost: gloo has no other way to wake a thread that waits in it.

Tried with torch 2.15: ``ProcessGroup.abort`` and ``shutdown``, of the group and of its backend, and
``destroy_process_group`` return at once from another thread and leave the waiting one where it is. A connection that is
shut down looks to gloo like a peer that died, and every pending call raises. Standard library only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_made: set[str] = set()
_ours: set[str] = set()


@contextmanager
def remembered() -> Iterator[None]:
    """Remember the connections that are made inside; those of an earlier group are forgotten."""
    made: set[str] = set()
    with noted(made):
        yield
    _made.clear()
    _made.update(made)


@contextmanager
def noted(made: set[str]) -> Iterator[None]:
    """Add the names of the sockets that are made inside to ``made``, after an error too."""
    before = set(_sockets())
    try:
        yield
    finally:
        new = set(_sockets()) - before
        made.update(new)
        _ours.update(new)


def let_go() -> None:
    """In a forked process: close all sockets that were noted in the one that trains.

    Else its peers would not see them closed when it is killed, and its port would stay taken. The numbers of the files
    stay taken, as there may still be objects that hold them.
    """
    found = _sockets()
    with suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        for name in _ours & set(found):
            os.dup2(nothing, found[name])
        os.close(nothing)


def cut_connections(made: set[str] | None = None) -> int:
    """Shut down the connections of those names that still exist, by default the remembered ones; from any thread.

    Returns:
        How many there were: none where there is no /proc (Linux has it), or where the group made them later (NCCL, and
        gloo with ``TORCH_GLOO_LAZY_INIT``).
    """
    cut = 0
    for name, descriptor in _sockets().items():
        if name in (_made if made is None else made):
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.getpeername()  # not of the socket that listens: gloo ends the process if that is shut down
                connection.shutdown(socket.SHUT_RDWR)
                cut += 1
    return cut


def _sockets() -> dict[str, int]:
    """The sockets of this process, by a name that the kernel does not use again while they are open."""
    found = {}
    with suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # closed meanwhile
                name = os.readlink(f"/proc/self/fd/{descriptor}")
                if name.startswith("socket:"):
                    found[name] = int(descriptor)
    return found

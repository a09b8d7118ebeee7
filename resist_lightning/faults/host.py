"""Identifies this process, and tells whether other processes of this host run. Standard library only."""

from __future__ import annotations

import os
import platform
import socket
from contextlib import suppress
from pathlib import Path

from resist_lightning.faults.messages import Process


def this_process(worker: int, members: int = 1) -> Process:
    """This process, as described to the others."""
    return Process(worker, socket.gethostname(), _home(), os.getpid(), members)


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs; a zombie does not."""
    if not Path("/proc/self/stat").exists():  # not Linux: silence will tell
        return True
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    # Behind the program's name, which may have spaces and parentheses itself.
    state = stat.rpartition(b")")[2].split()[0]
    return state not in (b"Z", b"X")


def _home() -> str:
    """A name of the process numbers that this process can see: host, its boot, and the PID namespace."""
    parts = [platform.node()]
    with suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)

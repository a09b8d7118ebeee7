"""Memory limits of worker processes: control groups of Linux, version 1. Needs root."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/sys/fs/cgroup/memory")


class MemoryGroup:
    """A group of processes with a memory limit; the kernel kills those that exceed it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def join(self) -> None:
        """Move this process into the group. Pages that it shares with its parent stay the parent's."""
        (self._path / "cgroup.procs").write_text(str(os.getpid()))


def available() -> bool:
    """Whether this process may make groups."""
    return os.access(_MEMORY / "cgroup.procs", os.W_OK)


@contextmanager
def memory_groups(limits: Sequence[int]) -> Iterator[list[MemoryGroup]]:
    """A group for each limit in bytes, removed at the end, when its processes have ended.

    Raises:
        ValueError: where this process may not make groups.
    """
    if not available():
        raise ValueError(f"a memory limit needs {_MEMORY} (control groups, version 1), and root.")
    paths = [_MEMORY / f"resist_{os.getpid()}_{number}" for number in range(len(limits))]
    made: list[Path] = []
    try:
        for path, limit in zip(paths, limits, strict=True):
            path.mkdir()
            made.append(path)
            (path / "memory.limit_in_bytes").write_text(str(limit))
        yield [MemoryGroup(path) for path in paths]
    finally:
        for path in made:
            path.rmdir()

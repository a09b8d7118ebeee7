"""A part of a core for a process, by the kernel's cgroups. Needs root; tried with version 1 of cgroups."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 50_000  # shorter than a round by far, so that a throttled worker is slow in every round alike

# Times as much of a busy core as any other process gets, up to the quota: others disturb the measurement less.
WEIGHT = 50


def why_no_quota() -> str:
    """The reason why no process can be given a part of a core here; empty where it can."""
    if os.geteuid() != 0:
        return "it needs root"
    if not _version_1() and "cpu" not in _read(ROOT / "cgroup.subtree_control").split():
        return "the kernel offers no cgroup with a CPU quota"
    return ""


@contextmanager
def quotas(cores: Sequence[float]) -> Iterator[list[Path]]:
    """A cgroup for each number of cores; a process joins one by writing its id to the file that is given for it.

    The processes must have ended when the context ends.
    """
    groups = [(ROOT / "cpu" if _version_1() else ROOT) / f"unequal_{os.getpid()}_{i}" for i in range(len(cores))]
    try:
        for group, share in zip(groups, cores, strict=True):
            group.mkdir()
            _limit(group, round(share * PERIOD_US))
        yield [group / "cgroup.procs" for group in groups]
    finally:
        for group in groups:
            _remove(group)


def _limit(group: Path, quota_us: int) -> None:
    if _version_1():  # two versions of one interface, under other names
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        (group / "cpu.shares").write_text(str(1024 * WEIGHT))
    else:
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        (group / "cpu.weight").write_text(str(100 * WEIGHT))


def _remove(group: Path) -> None:
    for _ in range(100):
        try:
            if group.exists():
                group.rmdir()
            return
        except OSError:  # the kernel is still taking leave of its last process
            time.sleep(0.05)


def _version_1() -> bool:
    return (ROOT / "cpu" / "cpu.cfs_quota_us").exists() or (ROOT / "cpu" / "tasks").exists()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""

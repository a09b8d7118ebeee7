"""Detects leaks of a test: environment variables, a process group, processes, threads, files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple, TypeVar

# Every descendant of the session inherits this variable, so an orphan is found, too.
MARK = "RESIST_LIGHTNING_TEST_SESSION"

# Variables of pytest, those that Lightning sets for its workers and leaves, and those that importing scikit-learn sets:
# restored, without a failure.
EXCUSED_VARIABLES = frozenset(
    {
        "PYTEST_CURRENT_TEST",
        "LOCAL_RANK",
        "NODE_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PL_GLOBAL_SEED",
        "PL_SEED_WORKERS",
        "CUBLAS_WORKSPACE_CONFIG",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
    }
)
EXCUSED_THREADS = ("TMonitor",)  # tqdm's watcher, one for all bars
EXCUSED_COMMANDS = ("torch_shm_manager", "torch/_inductor/compile_worker")

# Files that Lightning, Hydra and loggers write to the working directory; other new files may be somebody's work.
DROPPED_FILES = frozenset({"checkpoints", "lightning_logs", "mlruns", "multirun", "outputs", "runs", "wandb"})

Found = TypeVar("Found")

KERNEL_THREAD = 0x00200000  # PF_KTHREAD among the flags in /proc/PID/stat
PATIENCE_SECONDS = 3.0


@contextmanager
def no_leaks(root: Path) -> Iterator[None]:
    """Fail if the body leaves anything behind; variables, folder, process group and processes are cleaned up.

    Args:
        root: folder in which no logs and no outputs of a run may appear.
    """
    variables = dict(os.environ)
    folder = Path.cwd()
    files = {path.name for path in root.iterdir()}
    threads = set(threading.enumerate())
    processes = set(session_processes())
    try:
        yield
    finally:
        found = [
            *_restore_variables(variables),
            *_restore_folder(folder),
            *_destroy_group(),
            *_end_processes(processes),
            *_await_threads(threads),
            *_new_files(root, files),
        ]
    assert not found, "left behind: " + "; ".join(found)


def session_processes() -> dict[int, str]:
    """The processes that this session started and that still run, with their commands.

    Empty without /proc. Servers of multiprocessing are left out, as they last as long as the session.
    """
    pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()} if os.path.isdir("/proc") else set()
    # Reading all of a machine's processes before and after each test takes longer than most of the tests.
    _foreign.intersection_update(pids)  # a free pid may become that of one of ours
    found = {}
    for pid in pids - _foreign:
        with suppress(OSError):  # the process may end at any moment
            found[pid] = _read(f"/proc/{pid}")
    mark = f"{MARK}={os.environ.get(MARK, '')}".encode()
    parents = {pid: process.parent for pid, process in found.items()}
    ours = {pid for pid in found if mark in found[pid].variables or os.getpid() in _ancestors(pid, parents)}
    _foreign.update(pid for pid in found.keys() - ours - {os.getpid()} if found[pid].settled)
    servers = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    running = {pid: found[pid].command for pid in ours - servers - {os.getpid()} if found[pid].state != b"Z"}
    return {pid: cmd for pid, cmd in running.items() if not any(name in cmd for name in EXCUSED_COMMANDS)}


_foreign: set[int] = set()
"""Pids of processes that are not of this session, and never will be."""


class _Process(NamedTuple):
    state: bytes
    parent: int
    command: str
    variables: list[bytes]
    settled: bool
    """False if it was read in the middle of an exec."""


def _read(folder: str) -> _Process:
    """Read a process from /proc; in the middle of an exec it has no command and no variables, so wait a little."""
    for _ in range(100):
        state, parent, *fields = _bytes(f"{folder}/stat").rpartition(b")")[2].split()
        command = _bytes(f"{folder}/cmdline")
        settled = bool(command) or state == b"Z" or bool(int(fields[4]) & KERNEL_THREAD)
        if settled:
            break
        time.sleep(0.001)
    variables = _bytes(f"{folder}/environ") if command else b""
    text = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return _Process(state, int(parent), text, variables.split(b"\0"), settled)


def _bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def die_with_parent() -> None:
    """End this process and all of its group when its parent ends: a killed session cannot clean up.

    Runs in a thread of its own, in the leader of a process group.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while (pid := parents.get(pid, 0)) > 0:
        yield pid


def _restore_variables(before: dict[str, str]) -> list[str]:
    now = dict(os.environ)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return [f"environment variable {name}={now.get(name)}" for name in changed if name not in EXCUSED_VARIABLES]


def _restore_folder(before: Path) -> list[str]:
    if Path.cwd() == before:
        return []
    left = Path.cwd()
    os.chdir(before)
    return [f"working directory {left}"]


def _destroy_group() -> list[str]:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return []
    distributed.destroy_process_group()
    return ["an initialised process group"]


def _end_processes(before: set[int]) -> list[str]:
    def left() -> dict[int, str]:
        return {pid: command for pid, command in session_processes().items() if pid not in before}

    leaked = _last_of(left)
    for pid in leaked:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if leaked:
        _last_of(lambda: leaked.keys() & session_processes().keys())
    return [f"process {pid} ({command[:100]})" for pid, command in leaked.items()]


def _await_threads(before: set[threading.Thread]) -> list[str]:
    def left() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and type(t).__name__ not in EXCUSED_THREADS]

    return [f"thread {thread.name}" for thread in _last_of(left)]


def _new_files(root: Path, before: set[str]) -> list[str]:
    new = {path.name for path in root.iterdir()} - before
    return [f"file {name}" for name in sorted(new & DROPPED_FILES)]


def _last_of(left: Callable[[], Found]) -> Found:
    """The leftovers after some patience with those that are about to end; returns at once if there are none."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found

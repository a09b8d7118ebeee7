"""Loader processes, started in every way, when a worker's processes are all signalled, and when it is killed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, _utils

from resist_lightning.strategies.data.loader_processes import LoaderShield
from tests.helpers.processes import run_workers_to_the_end

CONTEXTS = ("fork", "spawn", "forkserver")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SOON_SECONDS = 3.0  # below the 5 s after which torch's loader processes check that their worker lives
HANGS_AT = 5


class Items(Dataset[int]):
    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 0:
            self.path.write_text(str(os.getpid()))
        if index == HANGS_AT:
            time.sleep(600)
        return index


def load(folder: Path, context: str, name: str) -> Any:
    return iter(
        DataLoader(Items(folder, name), None, num_workers=1, prefetch_factor=1, multiprocessing_context=context)
    )


def work(worker: int, folder: Path) -> Any:
    (load_under_signals if worker == 0 else kill_the_worker)(folder)


def load_under_signals(folder: Path) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "pid").rename(folder / "worker")
    noted: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: noted.append(number))
    shield = LoaderShield(SIGNALS)
    shield.install()
    loaders = [load(folder, context, context) for context in CONTEXTS]
    ended = load(folder, "fork", "terminated")
    assert [next(loader) for loader in [*loaders, ended]] == [0] * 4
    for number in SIGNALS:
        os.killpg(0, number)
        time.sleep(0.1)
    assert noted == [*SIGNALS]
    for index in range(1, HANGS_AT):
        assert [next(loader) for loader in [*loaders, ended]] == [index] * 4
    shield.remove()
    _utils.MP_STATUS_CHECK_INTERVAL = 0.2
    ended._shutdown_workers()  # its process hangs, and is terminated
    ended._workers[0].join(SOON_SECONDS)
    assert not ended._workers[0].is_alive()
    (folder / "ready").touch()
    time.sleep(600)


def kill_the_worker(folder: Path) -> None:
    while not (folder / "worker").exists():
        time.sleep(0.02)
    worker = int((folder / "worker").read_text())
    while not (folder / "ready").exists() and runs(worker):
        time.sleep(0.02)
    pids = {context: int((folder / context).read_text()) for context in CONTEXTS}
    assert all(runs(pid) for pid in pids.values())
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + SOON_SECONDS
    while any(runs(pid) for pid in pids.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [context for context, pid in pids.items() if runs(pid)] == []


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_they_go_on_under_signals_and_die_with_their_worker(tmp_path: Path) -> None:
    worker, other = run_workers_to_the_end(work, 2, tmp_path, timeout=120)

    assert worker.error is None, worker.traceback
    assert worker.end == "SIGKILL"
    assert other.error is None, other.traceback

"""Snapshots: each worker's state at the end of a round, on disk, written without communication.

::

    FOLDER/round=00000012/worker-0-of-3.5f00aa21.pt      shared tensors, its blocks, its random state, its place in
                          worker-1-of-3.9c4711d0.pt      the data; the checksum is in the name
                          worker-2-of-3.11e0c2ff.pt
           agents.json                                   whose run this is

At a border every block is whole in the file of some worker, so all files of a round together are the full model, for
any number of workers: where workers have different values of a tensor (overlap, fragments), it is their mean.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resist_lightning.checkpoint.atomic import part_of, write_text
from resist_lightning.checkpoint.files import check_sealed, write_sealed
from resist_lightning.errors import CheckpointError

KEPT_ROUNDS = 2
"""The newest, and the one before in case the newest is damaged."""

_AGENTS = "agents.json"
_ROUND = re.compile(r"round=(\d{8,})")
_FILE = re.compile(r"worker-(\d+)-of-(\d+)\.[0-9a-f]{8}\.pt")


@dataclass(frozen=True)
class Snapshot:
    """The files of a round that this worker can see.

    Args:
        round: the round that begins there.
        workers: number of workers that wrote it.
        files: their files, by worker.
    """

    round: int
    workers: int
    files: dict[int, Path]


class SnapshotFolder:
    """A folder of snapshots; all workers should see the same one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, state: dict[str, Any], round: int, worker: int, workers: int) -> None:
        """Write this worker's file, and remove its files of older rounds.

        The newest two rounds stay, and the newest one that is whole as far as this worker can see: where the disk of
        another worker is full, it is the one to resume from.

        Raises:
            OSError: if it cannot be written; the snapshots before it stay as they are.
        """
        folder = self._of(round)
        written = write_sealed(state, folder, f"worker-{worker}-of-{workers}")
        for file in folder.glob(f"worker-{worker}-of-*.pt"):
            if file != written:
                file.unlink(missing_ok=True)
        whole = self._newest_whole()
        for old in self._rounds()[KEPT_ROUNDS:]:
            if old != whole:
                # Also the partial files (``.part``) of a worker that was killed.
                _remove(self._of(old).glob(f"*worker-{worker}-of-*.p*t"), self._of(old))

    def newest_first(self) -> list[Snapshot]:
        """The files that this worker can see, newest round first."""
        found = []
        for round in self._rounds():
            # Runs with different numbers of workers may have written the same round.
            by_workers: dict[int, dict[int, Path]] = {}
            names: list[str] = []
            with suppress(FileNotFoundError):  # another worker has just removed it
                names = sorted(os.listdir(self._of(round)))
            for name in names:
                match = _FILE.fullmatch(name)
                if match is not None:
                    worker, workers = int(match[1]), int(match[2])
                    by_workers.setdefault(workers, {})[worker] = self._of(round) / name
            for workers in sorted(by_workers, reverse=True):
                found.append(Snapshot(round, workers, by_workers[workers]))
        return found

    def forget_later(self, round: int) -> None:
        """Remove the snapshots of rounds after ``round``: a run that was resumed from it never saw them."""
        for later in self._rounds():
            if later > round:
                _remove(self._of(later).glob("*worker-*-of-*.p*t"), self._of(later))

    def remove(self) -> None:
        """Remove all snapshots, and the folder if nothing else is in it: the user may keep other files there."""
        self.forget_later(-1)
        _remove([self.path / _AGENTS, part_of(self.path / _AGENTS)], self.path)

    def agents(self) -> list[int]:
        """Numbers of the agents whose workers may resume from here by themselves, and the mark of their run."""
        with suppress(OSError, ValueError):
            return [int(number) for number in json.loads((self.path / _AGENTS).read_text())]
        return []

    def make(self) -> None:
        """Make the folder, if it does not exist."""
        self.path.mkdir(parents=True, exist_ok=True)

    def set_agents(self, agents: Iterable[int]) -> None:
        """Write down the numbers for :meth:`agents`."""
        # Atomically: with an empty list, a run that is started again would take its own snapshots for another run's.
        write_text(json.dumps(sorted(agents)) + "\n", self.path / _AGENTS)

    def _newest_whole(self) -> int | None:
        """The newest round with a file of each worker that has any here; each host may have a folder of its own."""
        snapshots = self.newest_first()
        writers: dict[int, set[int]] = {}
        for snapshot in snapshots:
            writers.setdefault(snapshot.workers, set()).update(snapshot.files)
        for snapshot in snapshots:
            if writers[snapshot.workers] <= snapshot.files.keys():
                return snapshot.round
        return None

    def _rounds(self) -> list[int]:
        """The rounds that have snapshots, newest first."""
        names: list[str] = []
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            names = os.listdir(self.path)
        rounds = [int(match[1]) for match in map(_ROUND.fullmatch, names) if match]
        return sorted(rounds, reverse=True)

    def _of(self, round: int) -> Path:
        return self.path / f"round={round:08d}"


def usable(snapshots: Iterable[Snapshot], worker: int, workers: int) -> list[int]:
    """The rounds that this worker could resume from, newest first: the files it needs exist, and its share is whole.

    Where the number of workers has changed, each needs all files, and checks its share of them, so that together they
    read each file once: a round is whole if all workers find it usable.
    """
    found = []
    for snapshot in snapshots:
        files = needed(snapshot, worker, workers)
        share = files if snapshot.workers == workers else files[worker::workers]
        if files and _whole(share):
            found.append(snapshot.round)
    return found


def needed(snapshot: Snapshot, worker: int, workers: int) -> list[Path]:
    """The files that a worker must read: its own, or, after another number of workers, all; empty if one is missing."""
    if snapshot.workers == workers:
        return [snapshot.files[worker]] if worker in snapshot.files else []
    files = [snapshot.files[writer] for writer in range(snapshot.workers) if writer in snapshot.files]
    return files if len(files) == snapshot.workers else []


def _whole(files: list[Path]) -> bool:
    try:
        for file in files:
            check_sealed(file)
    except CheckpointError:
        return False
    return True


def _remove(files: Iterable[Path], folder: Path) -> None:
    with suppress(FileNotFoundError):  # another worker has just removed the folder
        for file in files:
            file.unlink(missing_ok=True)
    with suppress(OSError):  # something else is still there
        folder.rmdir()

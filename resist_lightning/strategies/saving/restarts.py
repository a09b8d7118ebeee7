"""Snapshots of a run, and resuming from them when torchrun restarts its workers."""

from __future__ import annotations

import os
import secrets
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from resist_lightning.checkpoint.files import read_file
from resist_lightning.checkpoint.snapshots import Snapshot, SnapshotFolder, needed, usable
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.torchrun import REMEDY, agent, shares_store, started_by_torchrun
from resist_lightning.errors import CheckpointError, CheckpointNotWritten, process_name
from resist_lightning.methods.layout import Layout
from resist_lightning.strategies.options import StrategyOptions

_ROUNDS_COMPARED = 4  # a worker is at most one round ahead of another, and a folder keeps few

_NO_NUMBER = -1

# Runs that this process has begun with the snapshots of a folder; a forked process has its parent's counts, too.
_runs: Counter[tuple[int, Path]] = Counter()


def check_shrinking(options: StrategyOptions) -> None:
    """Check, before any process is started, that a run can continue without a lost worker.

    Raises:
        ValueError: if torchrun keeps its store between attempts, in which the remaining workers cannot join again.
    """
    if options.on_worker_loss != "shrink":
        return
    if not started_by_torchrun():
        rank_zero_warn(
            "on_worker_loss='shrink' needs `torchrun --nnodes=MIN:MAX` to restart the workers; with another launcher, "
            "the loss of a worker ends the run."
        )
    elif shares_store():
        raise ValueError(
            "on_worker_loss='shrink' does not work while torchrun shares its store with the workers "
            f"(TORCHELASTIC_USE_AGENT_STORE=True): {REMEDY}."
        )


def check_other_workers(options: StrategyOptions, layout: Layout) -> None:
    """Check, before the training, that a run can continue with other numbers of workers.

    Raises:
        ValueError: if a setting does not fit every number: each restart would fail, until torchrun gives up.
    """
    if options.on_worker_loss == "shrink" and (problem := layout.fits_only_some()):
        raise ValueError(f"on_worker_loss='shrink' continues with other numbers of workers, and {problem}")


class Restarts:
    """The snapshots of one ``fit``.

    Args:
        folder: of the snapshots.
        options: of the strategy.
        collective: the workers.
    """

    def __init__(self, folder: Path, options: StrategyOptions, collective: Collective) -> None:
        self.folder = SnapshotFolder(folder)
        self.chosen: Snapshot | None = None
        self._agent = 0  # of this process, and of this run of it
        self._claim = 0  # worker 0's mark in the folder
        self._failing = False  # whether the newest snapshot could not be written
        self._options = options
        self._collective = collective

    def restarted(self) -> bool:
        """Whether torchrun has restarted this run, so that it resumes from these snapshots by itself; called once.

        False, after the folder was emptied, if not all workers had written their first snapshot.

        Collective: every worker must call this, in the same order.
        """
        run = os.getpid(), self.folder.path.resolve()
        _runs[run] += 1
        # Not counted among all fits of the script: it may skip those that are complete.
        self._agent = agent(_runs[run])
        started_again = bool(self._agent) and self._agent in self.folder.agents()
        snapshots = self.folder.newest_first()
        has_own = any(needed(snapshot, self._collective.worker, self._collective.workers) for snapshot in snapshots)
        rounds = len({snapshot.round for snapshot in snapshots})
        # Hosts may have folders of their own, so that workers see different files.
        rows = self._collective.gather_numbers([started_again, has_own, rounds])
        if not any(row[0] for row in rows):
            return False
        every_worker_has_own = all(row[1] for row in rows)
        # Without its newest file a worker has an older one: nobody begins a second round before all have the first.
        second_round = max(row[2] for row in rows) > 1
        if every_worker_has_own or second_round:
            return True
        rank_zero_info("Restarted by torchrun before all workers had written a snapshot: the run starts over.")
        self.end()
        return False

    def choose(self) -> dict[str, Any]:
        """Agree on the newest round that every worker can read, and read it.

        Collective: every worker must call this, in the same order.

        Returns:
            This worker's own file, or another one's after another number of workers; values are read from the disk only
            when they are used.

        Raises:
            CheckpointError: if there is no such round.
        """
        worker, workers = self._collective.worker, self._collective.workers
        snapshots = self.folder.newest_first()
        readable = self._readable_by_worker(usable(snapshots, worker, workers))
        common = set.intersection(*readable)
        if not common:
            members = self._collective.members
            seen = [f"{process_name(rank, members)} {sorted(rounds) or 'none'}" for rank, rounds in enumerate(readable)]
            raise CheckpointError(
                f"{self.folder.path} has no snapshot that all workers can read; rounds: {'; '.join(seen)}. All "
                "workers must see the same folder. Resume from a checkpoint instead: ckpt_path=PATH."
            )
        round, newest = max(common), max(snapshot.round for snapshot in snapshots)
        if round < newest:
            rank_zero_warn(
                f"the snapshot of round {newest} in {self.folder.path} is incomplete; resuming from round {round}."
            )
        # There may be several of a round, of different numbers of workers.
        self.chosen = next(s for s in snapshots if s.round == round and needed(s, worker, workers))
        # Every checksum has been verified, by one worker each.
        first: dict[str, Any] = read_file(needed(self.chosen, worker, workers)[0], mapped=True)
        return first

    def _readable_by_worker(self, mine: list[int]) -> list[set[int]]:
        """The newest rounds that each worker can read."""
        mine = mine[:_ROUNDS_COMPARED]
        padding = [-1] * (_ROUNDS_COMPARED - len(mine))  # all workers send equally many numbers
        rows = self._collective.gather_numbers([*mine, *padding])
        return [{int(number) for number in row if number >= 0} for row in rows]

    def states(self) -> Iterator[dict[str, Any]]:
        """The chosen snapshot of each worker, by rank; values are read from the disk only when they are used.

        So the shared tensors, which all files have, are read from one of them.

        Raises:
            CheckpointError: if this worker cannot read all files of it.
        """
        assert self.chosen is not None
        everyone = set(range(self.chosen.workers))
        missing = sorted(everyone - set(self.chosen.files))
        if missing:
            raise CheckpointError(
                f"the snapshot of round {self.chosen.round} in {self.folder.path} lacks the files of worker(s) "
                f"{missing}, whose part is in no other file. Keep snapshots in a folder that all workers can read."
            )
        for worker in range(self.chosen.workers):
            yield read_file(self.chosen.files[worker], mapped=True)

    def begin(self) -> None:
        """Claim the folder for this run. Collective: every worker must call this, in the same order.

        Raises:
            ValueError: if the folder has snapshots of a run that this one does not resume.
            CheckpointNotWritten: on all workers, if it cannot be written to and the settings say
                ``on_save_error="raise"``.
        """
        path = str(self.folder.path)
        # Resuming or not is the same on all workers, so this message pairs.
        if self.chosen is None and any(self._gather(len(self.folder.newest_first()))):
            raise ValueError(
                f"snapshots={path!r} has snapshots of a run that did not finish. To resume it: Trainer.fit(..., "
                f"ckpt_path={path!r}). To start over: remove the folder, or choose another one."
            )
        agents = self._gather(self._agent)
        failure = self._take_over({number for number in agents if number})
        number = 0 if failure is None else failure.errno or _NO_NUMBER
        # Also a barrier: nobody may write a snapshot before all have claimed the folder.
        numbers = self._gather(number)
        failed = [
            f"{process_name(rank, self._collective.members)}: {_reason(number)}"
            for rank, number in enumerate(numbers)
            if number
        ]
        # All workers raise, and one is enough to warn.
        if failed and (self._options.on_save_error == "raise" or self._collective.rank == 0):
            self._not_written(f"snapshots={path!r} cannot be written ({'; '.join(failed)}).", failure)

    def write(self, state: dict[str, Any], round: int) -> None:
        """Write this worker's file of a round. Sends nothing.

        Raises:
            CheckpointNotWritten: if it cannot be written and the settings say ``on_save_error="raise"``.
            ValueError: in worker 0, if another run writes to the folder.
        """
        if self._collective.member > 0:
            return  # the first member has the state of all
        self._check_claim()
        worker, workers = self._collective.worker, self._collective.workers
        try:
            self.folder.write(state, round, worker, workers)
        except OSError as error:
            already_told, self._failing = self._failing, True
            if not already_told:  # once, not in every round that finds the disk full
                self._not_written(f"worker {worker} could not write the snapshot of round {round}: {error}.", error)
        else:
            self._failing = False

    def due(self, round: int) -> bool:
        """Whether a snapshot is written where ``round`` begins."""
        return round > 0 and round % self._options.snapshot_every_n_rounds == 0

    def end(self) -> None:
        """Remove the snapshots of a run that has come to its end."""
        try:
            self.folder.remove()
        except OSError as error:
            rank_zero_warn(f"the snapshots in {self.folder.path} could not be removed ({error}). Remove the folder.")

    def describe(self) -> str:
        """The chosen snapshot, for messages."""
        assert self.chosen is not None
        return f"the snapshot that {self.chosen.workers} worker(s) wrote before round {self.chosen.round}"

    def check_workers(self) -> None:
        """Check that the run may continue with this number of workers.

        Raises:
            ValueError: if it may not.
        """
        assert self.chosen is not None
        workers = self._collective.workers
        if self.chosen.workers != workers and self._options.on_worker_loss == "stop":
            raise ValueError(
                f"{self.chosen.workers} workers wrote the snapshots in {self.folder.path}, but torchrun has started "
                f"{workers}. on_worker_loss='shrink' resumes with that number."
            )
        rank_zero_info(f"Restarted by torchrun: resuming from {self.describe()}.")

    def _take_over(self, agents: set[int]) -> OSError | None:
        """Claim the folder for this run; returns the error of a disk that refuses."""
        try:
            if self.chosen is not None:
                # By every worker: each host may have a folder of its own.
                self.folder.forget_later(self.chosen.round)
            if self._collective.rank == 0:
                self._claim = claim = secrets.randbits(48)
                self.folder.set_agents({*agents, claim})
            else:
                self.folder.make()  # a disk that refuses fails here, rather than at the first snapshot
        except OSError as error:
            self._claim = 0
            return error
        return None

    def _check_claim(self) -> None:
        """Check that no other run has claimed the folder at the same time, before either had a snapshot in it."""
        claims = self.folder.agents()
        if self._claim and claims and self._claim not in claims:
            raise ValueError(
                f"snapshots={str(self.folder.path)!r} is written by another run, too, and each replaces the other's "
                "files. Give each run a folder of its own, such as the trials of a search."
            )

    def _not_written(self, text: str, failure: OSError | None) -> None:
        """Raise, or warn that the training continues without this snapshot; earlier ones stay."""
        if self._options.on_save_error == "raise":
            raise CheckpointNotWritten(
                f"{text} Free disk space, or choose another folder; with on_save_error='warn' the training continues "
                "without it."
            ) from failure
        # By any worker, so not rank_zero_warn.
        warnings.warn(f"{text} The training continues without it.", stacklevel=2)

    def _gather(self, number: int) -> list[int]:
        return [int(row[0]) for row in self._collective.gather_numbers([number])]


def _reason(number: int) -> str:
    return "an error without a number" if number == _NO_NUMBER else os.strerror(number)

"""The overlap: the number of local steps during which a sync runs, given or chosen from measured times.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

OverlapChoice: TypeAlias = int | Literal["auto"]

MEASURED_SYNCS = 2
"""Number of measured syncs and rounds: each worker's shortest time counts, as a disturbance only adds time."""

MARGIN = 1.2
"""Beside the training a sync takes longer than alone, as both use the same cores."""

WORTH = 0.01
"""A sync that takes less than this share of a round is waited for: blocks that move would lose local steps."""


@dataclass(frozen=True)
class Overlaps:
    """The overlap of each round: the local steps during which its sync runs; immutable, and equal on all workers.

    Where the overlap is chosen, the first rounds wait for their syncs, and are measured::

        round                   0          1                2                3 ...
        overlap                 0          0                0                as chosen
        told when it ends       -          steps, sync 0    steps, sync 1    -

    A sync has the overlap that was known when its round began, so nothing changes in the middle of a round.

    Args:
        steps: overlap of every round, or, where it is chosen, of the rounds before the choice.
        round_steps: local steps of the shortest round, at least 2; None: nothing is chosen.
        workers: number of workers.
        measured_from: the first round whose sync is measured.
        seconds: for each measured round, each worker's seconds per local step, and of the sync before it.
        chosen: the first round with the chosen overlap, and the overlap; None before.
        fragments: number of successive syncs that cover the network; each is measured twice.
    """

    steps: int = 0
    round_steps: int | None = None
    workers: int = 1
    measured_from: int = 0
    seconds: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    chosen: tuple[int, int] | None = None
    fragments: int = 1

    def of_round(self, round: int) -> int:
        """Local steps at the end of ``round`` during which its sync is under way; 0: the training waits for it."""
        return self.chosen[1] if self.chosen is not None and round >= self.chosen[0] else self.steps

    def learn(self, round: int, step_seconds: Sequence[float], sync_seconds: Sequence[float]) -> Overlaps:
        """The overlaps with a measurement added; after the last measurement, with the choice.

        Args:
            round: the round that ends.
            step_seconds: each worker's seconds per local step in it.
            sync_seconds: each worker's seconds of the sync before it. A 0 in either is not a measurement.
        """
        if self.round_steps is None or self.chosen is not None or round <= self.measured_from:
            return self
        if min(*step_seconds, *sync_seconds) <= 0:  # a worker resumed in this round
            # With fragments the order of measurements tells which one was synced.
            return self if self.fragments == 1 else replace(self, seconds=(), measured_from=round)
        known = replace(self, seconds=(*self.seconds, (tuple(step_seconds), tuple(sync_seconds))))
        if len(known.seconds) < MEASURED_SYNCS * self.fragments:
            return known
        return replace(known, chosen=(round + 1, choose_overlap(*known.shortest_seconds(), self.round_steps)))

    def shortest_seconds(self) -> tuple[list[float], list[float]]:
        """Each worker's shortest measured time of a local step, and of a sync of its slowest fragment."""
        steps, syncs = zip(*self.seconds, strict=True)
        # A fragment is synced every `fragments` rounds.
        of_fragments = [_shortest(syncs[fragment :: self.fragments]) for fragment in range(self.fragments)]
        return _shortest(steps), [max(times) for times in zip(*of_fragments, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The measurements and the choice, as plain data for a checkpoint; empty where nothing is chosen."""
        if self.round_steps is None:
            return {}
        return {
            "round_steps": self.round_steps,
            "workers": self.workers,
            "fragments": self.fragments,
            "measured_from": self.measured_from,
            "seconds": [[list(steps), list(syncs)] for steps, syncs in self.seconds],
            "chosen": list(self.chosen) if self.chosen is not None else None,
        }

    def resumed(self, state: Mapping[str, Any], round: int) -> Overlaps:
        """The overlaps of a run that resumes in ``round``.

        Args:
            state: from :meth:`state_dict`; if it is empty, or of other workers, rounds or fragments, the measurements
                begin again.
            round: the round.
        """
        if self.round_steps is None:
            return self
        measured = (state.get("round_steps"), state.get("workers"), state.get("fragments", 1))
        if measured != (self.round_steps, self.workers, self.fragments):
            return replace(self, measured_from=max(round, self.measured_from), seconds=(), chosen=None)
        return self.with_state_dict(state)

    def with_state_dict(self, state: Mapping[str, Any]) -> Overlaps:
        """The overlaps with the measurements of a :meth:`state_dict` of a run with as many workers."""
        return replace(
            self,
            measured_from=int(state["measured_from"]),
            seconds=tuple((tuple(map(float, steps)), tuple(map(float, syncs))) for steps, syncs in state["seconds"]),
            chosen=(int(state["chosen"][0]), int(state["chosen"][1])) if state["chosen"] is not None else None,
        )

    def unused(self, round: int, begun: int) -> str:
        """A warning of a training that ends before anything is chosen; empty if it does not.

        Args:
            round: the round in which it begins.
            begun: number of rounds that have begun when it ends.
        """
        first = self.measured_from + waiting_rounds(self.fragments)  # the first round with the chosen overlap
        if self.round_steps is None or self.chosen is not None or not round < begun <= first:
            return ""
        return (
            f"overlap='auto': it is chosen after {first - round} rounds, and this training has {begun - round}, so "
            "every round waits for its sync. Give a number of local steps, or train longer."
        )

    def summary(self) -> dict[str, Any] | None:
        """The chosen overlap, its first round and the reason, as plain data; None before the choice, or without one."""
        if self.chosen is None:
            return None
        steps, syncs = self.shortest_seconds()
        return {
            "from_round": self.chosen[0],
            "local_steps": self.chosen[1],
            "fastest_step_seconds": min(steps),
            "slowest_sync_seconds": max(syncs),
        }

    def in_words(self) -> str:
        """The choice and its reason, for the user; empty before, or where nothing is chosen."""
        if self.chosen is None or self.round_steps is None:
            return ""
        first, overlap = self.chosen
        steps, syncs = self.shortest_seconds()
        measured = f"a sync takes {max(syncs):.3g} s, and a local step of the fastest worker {min(steps):.3g} s"
        if not overlap:
            return f"overlap=0 is chosen: {measured}, so waiting takes less than {WORTH:.0%} of a round."
        needed = _steps_beside(max(syncs), min(steps))
        more = f" The sync needs {needed}, so choose longer rounds, or fewer bits." if needed > overlap else ""
        return f"overlap={overlap} is chosen, from round {first} on: {measured}.{more}"


ALL_WAIT = Overlaps()
"""Every round waits for its sync."""


def choose_overlap(step_seconds: Sequence[float], sync_seconds: Sequence[float], round_steps: int) -> int:
    """The fewest local steps of the fastest worker that are longer than the slowest sync, with a margin.

    Args:
        step_seconds: each worker's seconds per local step.
        sync_seconds: each worker's seconds per sync.
        round_steps: local steps of the shortest round; at least one of them comes before the sync begins.

    Returns:
        0 where waiting for the sync costs next to nothing.
    """
    sync = max(sync_seconds)
    if sync < WORTH * round_steps * max(step_seconds):
        return 0
    return min(_steps_beside(sync, min(step_seconds)), round_steps - 1)


def overlap_of_blocks(overlap: int, shared_bytes: int, block_bytes: int) -> int:
    """The local steps at the end of a sync's overlap during which blocks are in transit.

    A link carries one message after the other: blocks need not leave before the shared layers have arrived.

    Args:
        overlap: the local steps of the whole sync.
        shared_bytes: bytes of the shared tensors; an all-reduce sends and receives them nearly twice.
        block_bytes: bytes of the blocks that a worker holds.
    """
    return math.ceil(overlap * block_bytes / max(2 * shared_bytes + block_bytes, 1))


def waiting_rounds(fragments: int) -> int:
    """Rounds that wait for their sync before the choice: the time of a sync is reported when the next one begins."""
    return MEASURED_SYNCS * fragments + 1


def _shortest(rows: Sequence[Sequence[float]]) -> list[float]:
    """Each worker's shortest time."""
    return [min(times) for times in zip(*rows, strict=True)]


def _steps_beside(sync: float, step: float) -> int:
    return math.ceil(MARGIN * sync / step)

"""Decides the blocks that each worker holds, for each round of a run. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resist_lightning.methods.resist.shares import MEASURED_ROUNDS, Cost, measured_costs, measured_counts, share_out
from resist_lightning.schedule.fragments import deal_fragments, plan_of_fragment
from resist_lightning.schedule.overlap import ALL_WAIT, Overlaps
from resist_lightning.schedule.partition import Partition, blocks_per_worker, deal, draw_partition, everything
from resist_lightning.schedule.transfers import SyncPlan, plan_sync


@dataclass(frozen=True)
class Schedule:
    """The partition of every round of a run; immutable, and equal on all workers.

    Where counts follow speed, each measurement gives a new schedule, the same on all workers::

        round         warm-up | 0      1    2     3    4     | 5      6 ...                   | finish
        blocks each   all       equal  few  many  few  many    equal  by the measured table     all
        seconds       -         -      kept for each worker     -      -                        -

    The counts begin one round after they are known, so that the plan of a sync never changes once its round has begun.

    Args:
        blocks: number of partitionable blocks.
        workers: number of workers.
        min_blocks: least number of blocks per worker.
        seed: seed of the partitions.
        warmup_rounds: number of first rounds in which every worker holds every block.
        stages: for a run that grows, least number of blocks per worker from a round on, until the next entry.
        finish_from: the round from which every worker holds every block again; None if none is known.
        counts: blocks of each worker from a round on, until the next entry; equal shares before the first one.
        measured_from: first of the rounds in which seconds are measured; None if none is.
        seconds: for each measured round so far, the round and each worker's seconds per local step.
        overlaps: local steps during which the syncs run.
        fragments: number of fragments of the network; each sync covers one of them, in turn.
    """

    blocks: int
    workers: int
    min_blocks: int
    seed: int
    warmup_rounds: int = 0
    stages: tuple[tuple[int, int], ...] = ()
    finish_from: int | None = None
    counts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    measured_from: int | None = None
    seconds: tuple[tuple[int, tuple[float, ...]], ...] = ()
    overlaps: Overlaps = ALL_WAIT
    fragments: int = 1

    def partition(self, round: int) -> Partition:
        """The partition of ``round``."""
        if self.fragments == 1:
            return self._drawn(round)
        counts = tuple(map(len, self._drawn(round).held))
        first = self._began(round)
        drawn = [max(first, self._last_sync(fragment, round) + 1) for fragment in range(self.fragments)]
        return deal_fragments(self.blocks, counts, self.seed, tuple(drawn))

    def fragment(self, round: int) -> int | None:
        """The fragment that the sync at the end of ``round`` covers; None: the whole network."""
        # Where counts change they change for all fragments: no round has blocks of two stages.
        if self.fragments == 1 or self._began(round + 1) == round + 1:
            return None
        return round % self.fragments

    def unsynced(self, rounds: int) -> str:
        """A warning of a training whose ``rounds`` end before each fragment had a sync; empty if they do not."""
        synced = {self.fragment(round) for round in range(min(rounds, self.fragments))}
        if None in synced or len(synced) == self.fragments:
            return ""
        return (
            f"fragments={self.fragments}: this training ends after {rounds} whole rounds, in which only {len(synced)} "
            "fragments have a sync. The others are averaged once, at the end. Choose fewer fragments or shorter "
            "rounds, or train longer."
        )

    def plan(self, round: int, left_out: tuple[int, ...] = ()) -> SyncPlan:
        """The plan of the sync at the end of ``round``."""
        plan, fragment = self.whole_plan(round, left_out), self.fragment(round)
        return plan if fragment is None else plan_of_fragment(plan, fragment, self.fragments)

    def whole_plan(self, round: int, left_out: tuple[int, ...] = ()) -> SyncPlan:
        """Like :meth:`plan`, but of all fragments: blocks that the sync does not cover stay where they are."""
        return plan_sync(self.partition(round), self.partition(round + 1), left_out)

    def coming_plan(self, fragment: int | None, round: int) -> SyncPlan:
        """The averaged blocks and the owners of the first sync at the end of ``round`` or later that covers a fragment.

        None: of all fragments. With several fragments the transfers are left out.
        """
        if self.fragments == 1:
            return self.plan(round)
        averaged: list[int] = []
        owner: dict[int, int] = {}
        for each in range(self.fragments) if fragment is None else [fragment]:
            following = round
            while self.fragment(following) not in (None, each):
                following += 1
            plan = plan_of_fragment(self.whole_plan(following), each, self.fragments)
            averaged += plan.averaged
            owner |= plan.owner
        return SyncPlan(tuple(sorted(averaged)), owner, (), ())

    def _began(self, round: int) -> int:
        """The first of the rounds with the counts of ``round``."""
        begins = [0, self.warmup_rounds, *(first for first, _ in (*self.stages, *self.counts))]
        if self.finish_from is not None:
            begins.append(self.finish_from)
        return max(first for first in begins if first <= round)

    def _last_sync(self, fragment: int, round: int) -> int:
        """The last round before ``round`` whose sync covers a fragment, not counting syncs of the whole network."""
        return round - 1 - (round - 1 - fragment) % self.fragments

    def _drawn(self, round: int) -> Partition:
        """The partition of ``round`` where all blocks are drawn again in every round."""
        if self.is_whole(round):
            return everything(self.blocks, self.workers)
        if self._is_measured(round):
            return deal(self.blocks, (self._count_measured(round),) * self.workers, self.seed, round)
        for first, counts in reversed(self.counts):  # the newest that applies
            if round >= first:
                return deal(self.blocks, counts, self.seed, round)
        return draw_partition(self.blocks, self.workers, self._least(round), self.seed, round)

    def is_whole(self, round: int) -> bool:
        """Whether ``round`` trains all blocks on all workers, scaled as at test time."""
        return round < self.warmup_rounds or (self.finish_from is not None and round >= self.finish_from)

    def training_scale(self, round: int, scale: float) -> float:
        """The factor on the residual branches of all blocks while they train in ``round``.

        Times the share of the blocks that a worker holds it is the same in all rounds, where a run grows.

        Args:
            round: the round.
            scale: the test-time scale: the share in a round that is neither whole nor in a later stage.
        """
        if self.is_whole(round):
            return scale
        return scale / self.share(round) if self.stages else 1.0

    def share(self, round: int) -> float:
        """Mean blocks per worker / number of blocks (1 if there are none)."""
        if not self.blocks:
            return 1.0
        held = self.partition(round).held
        return sum(map(len, held)) / (self.workers * self.blocks)

    def _least(self, round: int) -> int:
        """Least number of blocks per worker in a round."""
        for first, least in reversed(self.stages):
            if round >= first:
                return least
        return self.min_blocks

    def measuring(self, round: int) -> Schedule:
        """The schedule that begins to measure after ``round``, in which caches are still cold.

        Nothing is measured where every worker holds all blocks at any speed.
        """
        few, many = measured_counts(self.blocks, self.workers, self.min_blocks)
        first = max(round, self.warmup_rounds) + 1
        return replace(self, counts=(), measured_from=first if few < many else None, seconds=())

    def learn(self, round: int, seconds: Sequence[float]) -> Schedule:
        """The schedule with a measurement added; after the last one, with counts in proportion to speed.

        Args:
            round: the round that ends.
            seconds: each worker's seconds per local step; 0 if it took none.
        """
        if self.measured_from is None or self.counts or round < self.measured_from:
            return self
        known = self
        # None where a worker resumed, or where all hold all blocks.
        if self._is_measured(round) and min(seconds) > 0 and not self.is_whole(round):
            known = replace(self, seconds=(*self.seconds, (round, tuple(seconds))))
        if round < self.measured_from + MEASURED_ROUNDS - 1:
            return known
        # Not from the next round on, whose partition the plan of this sync has used already.
        return replace(known, counts=((round + 2, known._by_speed()),))

    def costs(self) -> tuple[Cost, ...]:
        """The measured cost of each worker; empty before, and where resuming has lost too many measurements."""
        rows: dict[int, list[tuple[float, ...]]] = {}
        for round, seconds in self.seconds:
            rows.setdefault(self._count_measured(round), []).append(seconds)
        if len(rows) < 2:
            return ()
        shortest = []
        for count in sorted(rows):
            # Two rounds are alike: each worker's shorter time counts.
            shortest.append((count, [min(times) for times in zip(*rows[count], strict=True)]))
        few, many = shortest
        return measured_costs(few, many)

    def state_dict(self) -> dict[str, Any]:
        """The measurements and the resulting counts, as plain data for a checkpoint; empty if nothing is measured."""
        overlap = self.overlaps.state_dict()
        if self.measured_from is None:
            return {"overlap": overlap} if overlap else {}
        return {
            "blocks": self.blocks,
            "workers": self.workers,
            "min_blocks": self.min_blocks,
            "counts": [[first, list(counts)] for first, counts in self.counts],
            "measured_from": self.measured_from,
            "seconds": [[round, list(seconds)] for round, seconds in self.seconds],
        }

    def resumed(self, table: Mapping[str, Any], round: int) -> Schedule:
        """The schedule of a run that resumes in ``round`` with a :meth:`state_dict`, which may be empty or not fit."""
        if self.measured_from is None:
            return replace(self, overlaps=self.overlaps.resumed(table.get("overlap", {}), round))
        here = {"blocks": self.blocks, "workers": self.workers, "min_blocks": self.min_blocks}
        # Counts that were measured for other workers or blocks do not fit, and are measured again.
        fits = {name: table.get(name) for name in here} == here
        return self.with_state_dict(table) if fits else self.measuring(round)

    def with_state_dict(self, table: Mapping[str, Any]) -> Schedule:
        """The schedule with a :meth:`state_dict`, which must fit."""
        if "overlap" in table:
            return replace(self, overlaps=self.overlaps.with_state_dict(table["overlap"]))
        return replace(
            self,
            counts=tuple((int(first), tuple(map(int, counts))) for first, counts in table["counts"]),
            measured_from=int(table["measured_from"]),
            seconds=tuple((int(round), tuple(map(float, seconds))) for round, seconds in table["seconds"]),
        )

    def _is_measured(self, round: int) -> bool:
        return self.measured_from is not None and 0 <= round - self.measured_from < MEASURED_ROUNDS

    def _count_measured(self, round: int) -> int:
        assert self.measured_from is not None
        return measured_counts(self.blocks, self.workers, self.min_blocks)[(round - self.measured_from) % 2]

    def _by_speed(self) -> tuple[int, ...]:
        costs = self.costs()
        if not costs:
            return blocks_per_worker(self.blocks, self.workers, self.min_blocks)
        return share_out(costs, self.blocks, self.min_blocks)

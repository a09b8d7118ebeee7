"""When a round ends: counting local steps. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from resist_lightning.partition import Partition, draw_partition, everything


@dataclass(frozen=True)
class Schedule:
    """The rounds of a run, before it starts: which partition each round has.

    Args:
        blocks: number of partitionable blocks.
        workers: number of workers.
        min_blocks: least number of blocks per worker.
        seed: seed of the partitions.
        local_steps: local steps per round.
        warmup_rounds: number of first rounds in which every worker holds every block.
    """

    blocks: int
    workers: int
    min_blocks: int
    seed: int
    local_steps: int
    warmup_rounds: int = 0

    def partition(self, round: int) -> Partition:
        """The partition of ``round``."""
        if self.is_warmup(round):
            return everything(self.blocks, self.workers)
        return draw_partition(self.blocks, self.workers, self.min_blocks, self.seed, round)

    def is_warmup(self, round: int) -> bool:
        """Whether ``round`` trains all blocks on all workers, scaled as at test time."""
        return round < self.warmup_rounds


@dataclass
class Clock:
    """Where a run is: the round, and the local steps taken in it.

    A round ends after ``local_steps`` local steps, wherever the borders of the epochs fall.
    """

    local_steps: int
    round: int = 0
    step: int = 0

    @property
    def due(self) -> bool:
        """Whether the round is complete, so that a sync must come before the next local step."""
        return self.step >= self.local_steps

    @property
    def total_steps(self) -> int:
        """Local steps since the run began."""
        return self.round * self.local_steps + self.step

    def tick(self) -> None:
        """Count one local step."""
        self.step += 1

    def next_round(self) -> None:
        """Begin the next round."""
        self.round += 1
        self.step = 0

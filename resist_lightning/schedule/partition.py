"""Partitions residual blocks over workers: a pure function of (blocks, counts per worker, seed, round).

Every worker computes the same partition by itself; nothing is sent and no random generator is read or moved.
Standard library only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Partition:
    """The blocks that each worker holds in one round.

    Args:
        held: for each worker, in order, the indices of its blocks in ascending order.
        blocks: number of partitionable blocks.
    """

    held: tuple[tuple[int, ...], ...]
    blocks: int

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self.held)

    def holders(self, block: int) -> tuple[int, ...]:
        """The workers that hold ``block``, in ascending order."""
        return self._holders[block]

    @cached_property
    def _holders(self) -> tuple[tuple[int, ...], ...]:
        """For each block its holders: ``held`` inverted once."""
        # A plan asks for every block: a search through all workers each time would take seconds for large runs.
        holders: list[list[int]] = [[] for _ in range(self.blocks)]
        for worker, held in enumerate(self.held):
            for block in held:
                holders[block].append(worker)
        return tuple(map(tuple, holders))


def blocks_per_worker(blocks: int, workers: int, min_blocks: int) -> tuple[int, ...]:
    """Number of blocks that each worker gets (section 4 of the paper: an equal share, but at least a minimum depth).

    Args:
        blocks: number of partitionable blocks, 0 or more.
        workers: number of workers, at least 1.
        min_blocks: least number of blocks for every worker, between 0 and ``blocks``.

    Returns:
        One count per worker. Counts differ by at most one; the first workers have the larger ones.

    Raises:
        ValueError: if an argument is outside its limits.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if not 0 <= min_blocks <= blocks:
        raise ValueError(
            f"min_blocks={min_blocks} is impossible with {blocks} partitionable block(s): it must lie between 0 and "
            f"{blocks}. Lower min_blocks, or choose a deeper network or more `blocks`."
        )
    least = max(blocks // workers, min_blocks)
    extra = max(blocks - workers * least, 0)
    return tuple(least + (1 if worker < extra else 0) for worker in range(workers))


def draw_partition(blocks: int, workers: int, min_blocks: int, seed: int, round: int) -> Partition:
    """Draw the partition of a round with equal shares; see :func:`deal`.

    Raises:
        ValueError: if an argument is outside its limits (see :func:`blocks_per_worker`).
    """
    return deal(blocks, blocks_per_worker(blocks, workers, min_blocks), seed, round)


@lru_cache(maxsize=64)  # a sync asks several times for the partitions of two rounds; IST has one for each layer
def deal(
    blocks: int, counts: tuple[int, ...], seed: int, round: int, what: str = "block", *, turns: str = "worker"
) -> Partition:
    """Draw the partition of a round by the circular deal.

    The blocks are laid on a circle in a random order; worker after worker, in a random order, takes the next ones::

        circle:  f a d | b e c | f a ...        3 workers, 6 blocks, min_blocks = 3
                 w1      w0      w2             every block is held, no worker holds one twice,
                                                numbers of holders differ by at most one

    Args:
        blocks: number of partitionable blocks, 0 or more.
        counts: number of blocks that each worker takes: at most ``blocks`` each, and together at least ``blocks``.
        seed: seed of the whole run; 0 is a seed.
        round: number of the round, counted from 0.
        what: name of the parts that are dealt, in the random key: parts of different names lie in different orders.
        turns: name of the order in which workers take: parts dealt with the same ``turns`` share it.

    Returns:
        The same partition for the same arguments, on every machine and in every version of Python.
    """
    workers = len(counts)
    circle = _shuffled(blocks, f"{seed}/{round}/{what}")
    held: list[tuple[int, ...]] = [()] * workers
    start = 0
    # In a random order too: otherwise the same workers would always share their blocks.
    for worker in _shuffled(workers, f"{seed}/{round}/{turns}"):
        end = start + counts[worker]
        dealt = [circle[place % blocks] for place in range(start, end)]
        held[worker] = tuple(sorted(dealt))
        start = end
    return Partition(tuple(held), blocks)


def everything(blocks: int, workers: int) -> Partition:
    """The trivial partition: every worker holds every block (warm-up rounds and the full model)."""
    return Partition((tuple(range(blocks)),) * workers, blocks)


def _shuffled(count: int, key: str) -> list[int]:
    """The numbers below ``count`` in an order drawn from ``key``: sorted by a hash, so it depends on nothing else."""
    # Hashed once for all numbers, as only the suffix differs.
    prefix = hashlib.sha256(f"{key}/".encode())

    def drawn(index: int) -> bytes:
        digest = prefix.copy()
        digest.update(b"%d" % index)
        return digest.digest()

    return sorted(range(count), key=drawn)

"""Chooses the number of blocks of each worker where workers differ in speed. Standard library only.

A local step of a worker with n blocks takes ``shared + block * n`` seconds. In four rounds all workers hold *few* and
*many* blocks alternately, so that both terms can be estimated; then the counts are chosen that make the slowest
worker's step as short as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resist_lightning.schedule.partition import blocks_per_worker

MEASURED_ROUNDS = 4
"""Few, many, few, many; of two rounds alike the shorter one counts, since a disturbance can only add time."""

EQUALLY_FAST = 1.15
"""Workers that differ by less than this factor are taken as equally fast: it may be noise."""

WORTH = 0.95
"""Unequal counts are used if they shorten the slowest worker's step to this share or less."""


@dataclass(frozen=True)
class Cost:
    """The time of a worker's local step.

    Args:
        shared: seconds that do not depend on its blocks.
        block: seconds for each block that it holds.
    """

    shared: float
    block: float

    def seconds(self, blocks: int) -> float:
        """Seconds of a local step with ``blocks`` blocks."""
        return self.shared + self.block * blocks


def check_counts(counts: Sequence[int], blocks: int, workers: int, min_blocks: int) -> None:
    """Raise a ValueError unless these numbers of blocks per worker are possible."""
    shown = f"blocks_per_worker={list(counts)}"
    if len(counts) != workers:
        raise ValueError(f"{shown} has {len(counts)} number(s) for {workers} worker(s): give one for each worker.")
    if max(counts) > blocks:
        raise ValueError(f"{shown}: a worker cannot hold more than the {blocks} partitionable block(s) there are.")
    if min(counts) < min_blocks:
        raise ValueError(f"{shown} goes below min_blocks={min_blocks}. Give every worker as many, or lower min_blocks.")
    if sum(counts) < blocks:
        raise ValueError(
            f"{shown} adds up to {sum(counts)}, but there are {blocks} partitionable blocks and each needs a holder. "
            f"Give {blocks - sum(counts)} more."
        )


def measured_counts(blocks: int, workers: int, min_blocks: int) -> tuple[int, int]:
    """The few and the many blocks that every worker holds in measured rounds: an equal share, and twice as many.

    They are equal where every worker holds all blocks anyway: then there is nothing to measure.
    """
    few = max(-(-blocks // workers), min_blocks)
    return few, min(2 * few, blocks)


def measured_costs(few: tuple[int, Sequence[float]], many: tuple[int, Sequence[float]]) -> tuple[Cost, ...]:
    """The cost of a local step for each worker, from two measurements.

    Args:
        few: number of blocks that each worker held, and each worker's seconds per local step.
        many: the same with more blocks.
    """
    few_blocks, few_seconds = few
    many_blocks, many_seconds = many
    # For two steps together, one with few blocks and one with many.
    both_blocks = few_blocks + many_blocks
    both_seconds = [fewer + more for fewer, more in zip(few_seconds, many_seconds, strict=True)]
    # The share of a block is estimated from all workers together, as it is the difference of two noisy numbers.
    share = (sum(many_seconds) - sum(few_seconds)) / sum(both_seconds) / (many_blocks - few_blocks)
    share = min(max(share, 0.0), 1 / both_blocks)  # neither blocks nor the rest take negative time
    costs = []
    for seconds in _without_noise(both_seconds):
        block = seconds * share
        costs.append(Cost((seconds - block * both_blocks) / 2, block))
    return tuple(costs)


def shortest_step(costs: Sequence[Cost], blocks: int, min_blocks: int) -> tuple[int, ...]:
    """Counts that make the slowest worker's local step as short as possible.

    Every worker begins with the minimum; each further block goes to the worker whose step is shortest with it, among
    equals to the first. No other counts do better: a block is only given where every other place would take longer.

    Args:
        costs: the cost of each worker.
        blocks: number of partitionable blocks.
        min_blocks: least number of blocks for every worker, between 0 and ``blocks``.

    Returns:
        One count per worker; their sum is that of equal counts. Equal costs give equal counts.
    """
    counts = [min_blocks] * len(costs)
    while sum(counts) < blocks:
        quickest = min(range(len(costs)), key=lambda worker: costs[worker].seconds(counts[worker] + 1))
        counts[quickest] += 1
    return tuple(counts)


def slowest(costs: Sequence[Cost], counts: Sequence[int]) -> float:
    """Seconds of the slowest worker's local step."""
    return max(cost.seconds(count) for cost, count in zip(costs, counts, strict=True))


def share_out(costs: Sequence[Cost], blocks: int, min_blocks: int) -> tuple[int, ...]:
    """Counts in proportion to speed; equal ones where others would gain next to nothing."""
    equal = blocks_per_worker(blocks, len(costs), min_blocks)
    best = shortest_step(costs, blocks, min_blocks)
    return best if slowest(costs, best) <= WORTH * slowest(costs, equal) else equal


def _without_noise(seconds: Sequence[float]) -> list[float]:
    """Replace the times of workers that are equally fast by their mean, beginning with the fastest."""
    order = sorted(range(len(seconds)), key=lambda worker: seconds[worker])
    result = list(seconds)
    while order:
        alike = [worker for worker in order if seconds[worker] <= EQUALLY_FAST * seconds[order[0]]]
        for worker in alike:
            result[worker] = sum(seconds[other] for other in alike) / len(alike)
        order = order[len(alike) :]
    return result

"""How many blocks each worker gets where workers differ in speed. Standard library only.

A local step of a worker with n blocks takes ``shared + block * n`` seconds. In four rounds all workers hold *few* and
*many* blocks in turn (the same number each), so that both parts can be told apart; then the blocks are shared out so
that the slowest worker's step is as short as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resist_lightning.schedule.partition import blocks_per_worker

MEASURED_ROUNDS = 4
"""Few, many, few, many; of two rounds alike the shorter one counts, since a disturbance only ever adds."""

EQUALLY_FAST = 1.15
"""Workers that differ by less than this are noise apart, and are taken as equally fast."""

WORTH = 0.95
"""Unequal counts must promise a step of the slowest worker at most so long, compared with equal ones."""


@dataclass(frozen=True)
class Cost:
    """What a local step of a worker takes.

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
    """The few and the many blocks that every worker holds in rounds that are measured.

    Few are an equal share, many are twice as many, but never more than there are. Where every worker holds all blocks
    anyway the two are the same, and there is nothing to measure.
    """
    few = max(-(-blocks // workers), min_blocks)
    return few, min(2 * few, blocks)


def measured_costs(few: tuple[int, Sequence[float]], many: tuple[int, Sequence[float]]) -> tuple[Cost, ...]:
    """What a local step costs each worker, from two measurements.

    How much of a step is its blocks is measured over all workers together, for it is the difference of two noisy
    numbers; how fast each one is, by itself. Workers within noise of each other get the same cost.

    Args:
        few: number of blocks that each worker held, and each worker's seconds per local step.
        many: the same with more blocks.
    """
    added = [fewer + more for fewer, more in zip(few[1], many[1], strict=True)]  # of one step with few, one with many
    growth = (sum(many[1]) - sum(few[1])) / sum(added) / (many[0] - few[0])
    growth = min(max(growth, 0.0), 1 / (few[0] + many[0]))
    costs = [(seconds, seconds * growth) for seconds in _without_noise(added)]
    return tuple(Cost((seconds - block * (few[0] + many[0])) / 2, block) for seconds, block in costs)


def shortest_step(costs: Sequence[Cost], blocks: int, min_blocks: int) -> tuple[int, ...]:
    """Counts that make the slowest worker's local step as short as possible.

    Every worker begins with the minimum; each further block goes to the worker whose step is shortest with it, among
    equals to the first. No other counts do better: a block is only given where every other place would take longer.

    Args:
        costs: of each worker.
        blocks: number of partitionable blocks.
        min_blocks: least number of blocks for every worker, between 0 and ``blocks``.

    Returns:
        One count per worker; they add up to what equal counts add up to. Equal costs give equal counts.
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
    """Counts in proportion to speed; the equal ones where others would gain next to nothing."""
    equal = blocks_per_worker(blocks, len(costs), min_blocks)
    best = shortest_step(costs, blocks, min_blocks)
    return best if slowest(costs, best) <= WORTH * slowest(costs, equal) else equal


def _without_noise(seconds: Sequence[float]) -> list[float]:
    """From the fastest on, workers that are equally fast take their mean."""
    order = sorted(range(len(seconds)), key=lambda worker: seconds[worker])
    result = list(seconds)
    while order:
        alike = [worker for worker in order if seconds[worker] <= EQUALLY_FAST * seconds[order[0]]]
        for worker in alike:
            result[worker] = sum(seconds[other] for other in alike) / len(alike)
        order = order[len(alike) :]
    return result

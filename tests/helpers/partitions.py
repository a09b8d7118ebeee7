"""Arbitrary partitions and rules about them, for property-based tests."""

from __future__ import annotations

from hypothesis import strategies as st

from resist_lightning.schedule.partition import Partition


@st.composite
def settings(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(blocks, workers, min_blocks, seed, round), all valid."""
    blocks = draw(st.integers(0, 30))
    workers = draw(st.integers(1, 9))
    minimum = draw(st.integers(0, blocks))
    return blocks, workers, minimum, draw(st.integers(0, 2**40)), draw(st.integers(0, 10**6))


@st.composite
def two_partitions(draw: st.DrawFn) -> tuple[Partition, Partition]:
    """Any two partitions of the same blocks over the same workers, more varied than those of a run."""
    workers = draw(st.integers(1, 6))
    someone = st.sets(st.integers(0, workers - 1), min_size=1)
    rows = draw(st.lists(st.tuples(someone, someone), max_size=12))
    return of_holders([old for old, _ in rows], workers), of_holders([new for _, new in rows], workers)


def of_holders(holders: list[set[int]], workers: int) -> Partition:
    """The partition in which block i is held by ``holders[i]``."""
    held = [tuple(block for block, who in enumerate(holders) if worker in who) for worker in range(workers)]
    return Partition(tuple(held), len(holders))

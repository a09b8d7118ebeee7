"""Divides a network into fragments: each sync covers one of them, in turn (Streaming DiLoCo, arXiv 2501.18512).

::

    fragments = 3          blocks 0 3 6 ..   1 4 7 ..   2 5 8 ..   shared layers: by module, of about equal bytes
    sync after round           0                1          2
                               3                4          5       each fragment every third round

Between its own syncs a fragment stays as it was drawn, so a round has blocks that were drawn in different rounds.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from resist_lightning.schedule.partition import Partition, deal
from resist_lightning.schedule.transfers import SyncPlan, Transfer


def fragment_of_block(block: int, fragments: int) -> int:
    """The fragment of a block: neighbours are in different ones, so that a fragment has blocks of all depths."""
    return block % fragments


def spread(sizes: Mapping[str, int], fragments: int) -> dict[str, int]:
    """Assign shared tensors to fragments of about equal bytes; the tensors of a module stay together.

    Args:
        sizes: bytes of each tensor, by name.
        fragments: number of fragments, at least 1.

    Returns:
        The fragment of each tensor, by name: the largest module first, each to the smallest fragment so far.
    """
    modules: dict[str, int] = {}
    for name, size in sizes.items():
        module = name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + size
    totals, chosen = [0] * fragments, {}
    for module in sorted(modules, key=lambda module: -modules[module]):  # among equals in the order of the network
        smallest = totals.index(min(totals))
        chosen[module] = smallest
        totals[smallest] += modules[module]
    return {name: chosen[name.rpartition(".")[0]] for name in sizes}


def counts_of_fragments(blocks: int, counts: Sequence[int], fragments: int) -> tuple[tuple[int, ...], ...]:
    """Number of blocks of each fragment that each worker holds: as even as the fragments are.

    Args:
        blocks: number of partitionable blocks.
        counts: blocks of each worker, together at least ``blocks``, and none more than ``blocks``.
        fragments: number of fragments.

    Returns:
        For each fragment, a count for each worker. The counts of a worker add up to its total, those of a fragment to
        at least its blocks; none exceeds the number of blocks in the fragment.
    """
    sizes = [len(range(fragment, blocks, fragments)) for fragment in range(fragments)]
    table = [[0] * len(counts) for _ in range(fragments)]
    turn = 0
    for worker, count in enumerate(counts):
        left = count
        while left:
            # Fragments take turns, across workers too, so that every block has a holder.
            if table[turn][worker] < sizes[turn]:
                table[turn][worker] += 1
                left -= 1
            turn = (turn + 1) % fragments
    return tuple(map(tuple, table))


@lru_cache(maxsize=8)  # a sync asks several times for the partitions of a few rounds
def deal_fragments(blocks: int, counts: tuple[int, ...], seed: int, drawn: tuple[int, ...]) -> Partition:
    """The partition of a round whose fragments were drawn in different rounds.

    Args:
        blocks: number of partitionable blocks.
        counts: blocks of each worker.
        seed: seed of the partitions.
        drawn: for each fragment, the round for which its present holders were drawn.
    """
    fragments = len(drawn)
    held: list[list[int]] = [[] for _ in counts]
    for fragment, of_workers in enumerate(counts_of_fragments(blocks, counts, fragments)):
        size = len(range(fragment, blocks, fragments))
        what, turns = f"block of fragment {fragment}", f"worker of fragment {fragment}"
        dealt = deal(size, of_workers, seed, drawn[fragment], what, turns=turns)
        for mine, found in zip(held, dealt.held, strict=True):
            mine.extend(fragment + fragments * block for block in found)
    return Partition(tuple(tuple(sorted(mine)) for mine in held), blocks)


def plan_of_fragment(plan: SyncPlan, fragment: int, fragments: int) -> SyncPlan:
    """The part of a plan that covers one fragment."""

    def of_fragment(transfers: Iterable[Transfer]) -> tuple[Transfer, ...]:
        return tuple(each for each in transfers if fragment_of_block(each.block, fragments) == fragment)

    return replace(
        plan,
        averaged=tuple(block for block in plan.averaged if fragment_of_block(block, fragments) == fragment),
        owner={block: root for block, root in plan.owner.items() if fragment_of_block(block, fragments) == fragment},
        merge=of_fragment(plan.merge),
        hand_over=of_fragment(plan.hand_over),
        fragment=fragment,
    )

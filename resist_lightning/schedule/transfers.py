"""Plans the transfers of blocks at a sync, from the old and the new partition. Standard library only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from resist_lightning.schedule.partition import Partition


class Transfer(NamedTuple):
    """The transfer of a block from one worker to another."""

    source: int
    target: int
    block: int


@dataclass(frozen=True)
class SyncPlan:
    """The merges and hand-overs of the blocks between two rounds, in this order.

    ::

                         before            merge           hand_over              after
        averaged   a   0 1 2 (all)     all-reduce, with the shared layers       0 1 2 (all)
        merged     b   0 1             1 ──► 0 (mean)      0 ──► 2              2
        moved      c   2                                   2 ──► 1              1
        kept       d   0                                   nothing is sent      0

    Args:
        averaged: blocks that all workers hold before and after; they join the all-reduce of the shared layers.
        owner: for every other block, the worker that has its value after the merge.
        merge: transfers of the values that the owner averages with its own.
        hand_over: transfers of the final values to the holders of the next round.
        left_out: workers whose values enter no mean.
        fragment: the fragment that the sync covers (``schedule/fragments.py``); None: the whole network.
    """

    averaged: tuple[int, ...]
    owner: dict[int, int]
    merge: tuple[Transfer, ...]
    hand_over: tuple[Transfer, ...]
    left_out: tuple[int, ...] = ()
    fragment: int | None = None


def plan_sync(
    before: Partition, after: Partition, left_out: tuple[int, ...] = (), *, all_reduce: bool = True
) -> SyncPlan:
    """Plan the blocks' part of a sync.

    A block travels straight from its last holder to its next ones. Where several workers held it, one of them (the
    owner) first collects and averages; an owner that also holds the block in the next round saves a transfer, and
    among equals the one that owns the fewest blocks so far is taken.

    Args:
        before: the partition of the round that ends.
        after: the partition of the next round.
        left_out: workers that do not count as holders of blocks that others hold too.
        all_reduce: whether blocks that all workers hold before and after are averaged; else they have owners as well.

    Returns:
        The plan, the same on every worker.

    Raises:
        ValueError: if the partitions differ in blocks or workers, or a block has no holder.
    """
    if (before.blocks, before.workers) != (after.blocks, after.workers):
        raise ValueError(
            f"cannot sync {before.blocks} blocks on {before.workers} workers to {after.blocks} on {after.workers}."
        )
    if left_out:
        before = _without(before, left_out)
    averaged: list[int] = []
    owner: dict[int, int] = {}
    merge: list[Transfer] = []
    hand_over: list[Transfer] = []
    owned: Counter[int] = Counter()
    for block in range(before.blocks):
        old, new = before.holders(block), after.holders(block)
        if not old or not new:
            raise ValueError(f"block {block} has no holder {'after' if old else 'before'} the sync: it would be lost.")
        # A block that all hold before and after is cheaper in the all-reduce than collected at one owner.
        if all_reduce and len(old) == len(new) == before.workers > 1:
            averaged.append(block)
            continue
        root = _owner(old, new, owned)
        owned[root] += 1
        owner[block] = root
        merge.extend(Transfer(worker, root, block) for worker in old if worker != root)
        hand_over.extend(Transfer(root, worker, block) for worker in new if worker != root)
    return SyncPlan(tuple(averaged), owner, tuple(merge), tuple(hand_over), left_out)


def plan_outer(sync: SyncPlan, following: SyncPlan, workers: int) -> tuple[Transfer, ...]:
    """Plan how the velocities of an outer optimizer travel: from the owner of a block to its next owner.

    The owner takes the outer step, as it has the mean; all workers do where the block is averaged. So a velocity goes
    to one of the next holders only, beside the block itself.

    Args:
        sync: the plan of a sync.
        following: the plan of the next one.
        workers: number of workers.
    """
    transfers: list[Transfer] = []
    for block, root in sync.owner.items():
        targets = [following.owner[block]] if block in following.owner else range(workers)
        transfers.extend(Transfer(root, target, block) for target in targets if target != root)
    return tuple(transfers)


def _owner(old: tuple[int, ...], new: tuple[int, ...], owned: Counter[int]) -> int:
    """The last holder, preferably one that stays, that owns the fewest blocks so far."""
    if len(old) == 1:
        return old[0]
    # An owner that stays saves a transfer; owners send to all next holders, so their work is spread.
    staying = [worker for worker in old if worker in new]
    return min(staying or old, key=lambda worker: (owned[worker], worker))


def _without(partition: Partition, left_out: tuple[int, ...]) -> Partition:
    """The partition in which workers that are left out hold only blocks that nobody else holds."""
    held_by_others: set[int] = set()
    for worker, blocks in enumerate(partition.held):
        if worker not in left_out:
            held_by_others.update(blocks)
    held = list(partition.held)
    for worker in left_out:
        # A block that only this worker has must not be lost, whatever its values are worth.
        held[worker] = tuple(block for block in held[worker] if block not in held_by_others)
    return replace(partition, held=tuple(held))


def plan_assembly(sync: SyncPlan, worker: int, workers: int, *, unequal: bool = True) -> SyncPlan:
    """Plan one worker's part in assembling the full model on every worker, as if the round ended here.

    Averages and merges as ``sync`` would, at the same owners, so that the full model equals the result of the sync,
    bit for bit.

    Args:
        sync: the plan of the sync that would come next.
        worker: the worker; all parts together have (workers - 1) transfers of every block, too many to be made here.
        workers: number of workers.
        unequal: whether the holders of a block may have different values; else they need none from its owner.
    """
    others = [other for other in range(workers) if other != worker]
    spread: list[Transfer] = []
    has: set[tuple[int, int]] = set()
    if not unequal:
        has = {(source, block) for source, _, block in sync.merge}
    for block, root in sync.owner.items():
        if root == worker:
            spread.extend(Transfer(root, other, block) for other in others if (other, block) not in has)
        elif (worker, block) not in has:
            spread.append(Transfer(root, worker, block))
    return replace(sync, hand_over=tuple(spread))


def plan_collection(sync: SyncPlan, *, unequal: bool) -> dict[int, tuple[int, ...]]:
    """Plan how the full model is assembled on worker 0 alone, as if the round ended here.

    Every holder sends its value of a block to worker 0, which takes the mean as the block's owner would at the sync.
    So nobody else receives or changes anything.

    Args:
        sync: the plan of the sync that would come next.
        unequal: whether the holders of a block may have different values.

    Returns:
        For each block that is not averaged with the shared layers, the workers whose values worker 0 averages: the
        owner, then the others; worker 0 itself may be among them. Empty where worker 0 holds the value already.
    """
    holders = {block: [root] for block, root in sync.owner.items()}
    for source, _, block in sync.merge:
        holders[block].append(source)
    if unequal:
        return {block: tuple(found) for block, found in holders.items()}
    return {block: () if 0 in found else (found[0],) for block, found in holders.items()}

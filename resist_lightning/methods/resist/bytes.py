"""The bytes of a ResIST sync, by closed form. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resist_lightning.comm.byte_formulas import WireFormat, all_reduce_bytes
from resist_lightning.schedule.transfers import SyncPlan, Transfer, plan_outer


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts; those that are averaged, by name of the data type.

    Args:
        shared: bytes of the shared tensors that are averaged, but for those that are compressed.
        blocks: bytes of each partitionable block on the wire, its buffers included; all data types together.
        averaged: bytes of each block that an average of it sends: all but frozen and compressed parameters.
        states: bytes of what travels with each block beside it: its optimizer state, if momentum travels, and its part
            of a copy of the module that is kept.
        wire: how trainable parameters are compressed; None if they are not.
        shared_entries: entries of the shared parameters that are compressed.
        block_entries: the same for each block.
        outer: bytes of the velocity of each block, on the wire; empty without an outer optimizer.
    """

    shared: Mapping[str, int]
    blocks: tuple[int, ...]
    averaged: tuple[Mapping[str, int], ...]
    states: tuple[int, ...]
    wire: WireFormat | None = None
    shared_entries: int = 0
    block_entries: tuple[int, ...] = ()
    outer: tuple[int, ...] = ()


def sync_bytes(plan: SyncPlan, sizes: Sizes, workers: int, following: SyncPlan | None = None) -> list[dict[str, int]]:
    """Bytes that each worker sends in a sync, by kind, exactly.

    Blocks that all workers hold before and after join the all-reduce of the shared layers and count as ``shared``.

    Args:
        plan: the plan of the sync.
        sizes: bytes of the model's parts.
        workers: number of workers.
        following: the plan of the next sync; velocities of an outer optimizer go to who merges the block then.

    Returns:
        For each worker, the bytes sent of the kinds ``shared``, ``merge``, ``hand_over``, ``state`` and ``outer``.

    Raises:
        ValueError: if there is an outer optimizer, and no ``following`` plan.
    """
    if sizes.outer and following is None:
        raise ValueError("velocities of an outer optimizer travel by the next sync's plan: give it as `following`.")
    velocities = plan_outer(plan, following, workers) if sizes.outer and following is not None else ()
    reduced = Counter(sizes.shared)
    for block in plan.averaged:
        reduced.update(sizes.averaged[block])
    shared = sum(all_reduce_bytes(size, workers) for size in reduced.values())
    merge = _sent(plan.merge, sizes.blocks)
    hand_over = _sent(plan.hand_over, sizes.blocks)
    state = _sent((*plan.merge, *plan.hand_over), sizes.states)
    outer = _sent(velocities, sizes.outer)
    return [
        {
            "shared": shared + _compressed_mean(plan, sizes, worker, workers),
            "merge": merge[worker],
            "hand_over": hand_over[worker],
            "state": state[worker],
            "outer": outer[worker],
        }
        for worker in range(workers)
    ]


def _compressed_mean(plan: SyncPlan, sizes: Sizes, worker: int, workers: int) -> int:
    if sizes.wire is None or workers == 1:
        return 0
    entries = sizes.shared_entries + sum(sizes.block_entries[block] for block in plan.averaged)
    return sizes.wire.mean_bytes(entries, worker, workers)


def _sent(transfers: Sequence[Transfer], sizes: Sequence[int]) -> Counter[int]:
    """Bytes that each worker sends."""
    sent: Counter[int] = Counter()
    for transfer in transfers:
        sent[transfer.source] += sizes[transfer.block]
    return sent

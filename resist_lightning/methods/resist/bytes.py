"""The bytes of a ResIST sync, and of an assembly of the full model, by closed form. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resist_lightning.comm.byte_formulas import WireFormat, all_reduce_bytes
from resist_lightning.schedule.fragments import fragment_of_block
from resist_lightning.schedule.transfers import SyncPlan, Transfer, plan_assembly, plan_collection, plan_outer


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts; of those that are averaged, by name of the data type.

    Args:
        shared: bytes of the shared tensors that are averaged, but for those that are compressed.
        blocks: bytes of each partitionable block on the wire, its buffers included; all data types together.
        averaged: bytes of each block that an average of it sends: all but frozen and compressed parameters.
        states: bytes that travel beside each block: its optimizer state, if momentum travels, and its part of a copy of
            the module that is kept.
        wire: format of compressed trainable parameters; None if they are not compressed.
        shared_entries: entries of the shared parameters that are compressed: of matrices, and of vectors.
        block_entries: the same for each block.
        outer: bytes of the velocity of each block, on the wire; empty without an outer optimizer.
    """

    shared: Mapping[str, int]
    blocks: tuple[int, ...]
    averaged: tuple[Mapping[str, int], ...]
    states: tuple[int, ...]
    wire: WireFormat | None = None
    shared_entries: tuple[int, int] = (0, 0)
    block_entries: tuple[tuple[int, int], ...] = ()
    outer: tuple[int, ...] = ()


def sync_bytes(plan: SyncPlan, sizes: Sizes, workers: int, following: SyncPlan | None = None) -> list[dict[str, int]]:
    """Bytes that each worker sends in a sync, by kind, exactly.

    Blocks that all workers hold before and after join the all-reduce of the shared layers and count as ``shared``.

    Args:
        plan: the plan of the sync.
        sizes: bytes of the model's parts.
        workers: number of workers.
        following: the plan of the next sync; velocities of an outer optimizer go to the block's owner in it.

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


@dataclass(frozen=True)
class Observed:
    """Bytes of a model's parts in the assembly of the full model, which sends them as they are, whatever the wire.

    Args:
        shared: bytes that an all-reduce of the shared tensors sums up, by name of the data type, for each fragment.
        shared_packed: bytes of the same tensors in a message.
        blocks: bytes of each partitionable block in a message.
        averaged: as ``shared``, for the tensors of each block that may change.
        averaged_packed: as ``shared_packed``, for the tensors of each block that may change.
        norms: the same for batch-norm statistics that are re-estimated, in one message for each data type.
    """

    shared: tuple[Mapping[str, int], ...]
    shared_packed: int
    blocks: tuple[int, ...]
    averaged: tuple[Mapping[str, int], ...]
    averaged_packed: tuple[int, ...]
    norms: Mapping[str, int]


def observation_bytes(plan: SyncPlan, sizes: Observed, workers: int, *, unequal: bool, at_first: bool) -> list[int]:
    """Bytes that each worker sends to assemble the full model, exactly.

    Args:
        plan: the plan of a sync of the whole network, as if the round ended here.
        sizes: bytes of the model's parts.
        workers: number of workers.
        unequal: whether any worker has stepped since the last sync.
        at_first: whether worker 0 alone gets it.
    """
    if at_first:
        return _collected(plan, sizes, workers, unequal=unequal)
    fragments = list(map(Counter, sizes.shared))
    for block in plan.averaged:
        fragments[fragment_of_block(block, len(fragments))].update(sizes.averaged[block])
    messages = [size for of_fragment in fragments for size in of_fragment.values()]
    together = sum(all_reduce_bytes(size, workers) for size in messages) if unequal else 0
    together += sum(all_reduce_bytes(size, workers) for size in sizes.norms.values())
    merge = _sent(plan.merge if unequal else (), sizes.blocks)
    spread: Counter[int] = Counter()
    for worker in range(workers):
        own = plan_assembly(plan, worker, workers, unequal=unequal).hand_over
        spread[worker] = _sent([each for each in own if each.source == worker], sizes.blocks)[worker]
    return [together + merge[worker] + spread[worker] for worker in range(workers)]


def _collected(plan: SyncPlan, sizes: Observed, workers: int, *, unequal: bool) -> list[int]:
    sent = [0] * workers
    together = sizes.shared_packed + sum(sizes.averaged_packed[block] for block in plan.averaged)
    for worker in range(1, workers):
        if unequal and worker not in plan.left_out:
            sent[worker] += together
    for block, holders in plan_collection(plan, unequal=unequal).items():
        for worker in set(holders) - {0}:
            sent[worker] += sizes.blocks[block]
    return sent


def _compressed_mean(plan: SyncPlan, sizes: Sizes, worker: int, workers: int) -> int:
    if sizes.wire is None or workers == 1:
        return 0
    parts = [sizes.shared_entries, *(sizes.block_entries[block] for block in plan.averaged)]
    matrices, vectors = (sum(entries) for entries in zip(*parts, strict=True))
    return sizes.wire.mean_bytes(matrices, vectors, worker, workers)


def _sent(transfers: Sequence[Transfer], sizes: Sequence[int]) -> Counter[int]:
    """Bytes that each worker sends."""
    sent: Counter[int] = Counter()
    for transfer in transfers:
        sent[transfer.source] += sizes[transfer.block]
    return sent

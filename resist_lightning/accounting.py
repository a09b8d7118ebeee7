"""Bytes by closed form: what the methods must send, to stand beside what was counted. Standard library only.

Bytes are decimal and count what a worker *sends*; what it receives is the same in total.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resist_lightning.plan import SyncPlan, Transfer

SYNC_KINDS = ("shared", "merge", "hand_over", "state")

TRAINING_KINDS = (*SYNC_KINDS, "boundary", "output")

KINDS = (*TRAINING_KINDS, "evaluation", "checkpoint", "start", "control")
"""Kinds of bytes: training (``shared`` layers, ``merge``, ``hand_over``, optimizer ``state``; between stages, what
crosses a ``boundary``, and the network's ``output``), observation (``evaluation``, ``checkpoint``), once at the
``start``, and ``control`` (headers)."""


def all_reduce_bytes(payload_bytes: int, workers: int) -> int:
    """Bytes that one worker sends in an all-reduce of ``payload_bytes``: 2 (S - 1) / S of them, rounded up."""
    return -(-2 * (workers - 1) * payload_bytes // workers)


def ddp_bytes(model_bytes: int, workers: int, steps: int) -> int:
    """Bytes that one worker of data-parallel training sends: all gradients, in every step."""
    return steps * all_reduce_bytes(model_bytes, workers)


def local_sgd_bytes(model_bytes: int, workers: int, rounds: int) -> int:
    """Bytes that one worker of local SGD sends: all parameters, once a round."""
    return rounds * all_reduce_bytes(model_bytes, workers)


def parameter_server_bytes(subnet_bytes: Sequence[int]) -> int:
    """Bytes of a round by the paper's accounting (Table 1): every worker sends and receives its sub-network."""
    return 2 * sum(subnet_bytes)


@dataclass(frozen=True)
class WireFormat:
    """How trainable parameters look on the wire: groups of entries, with a scale each.

    Args:
        bits: bits of an entry.
        group: entries that share a scale; the last group of a message is filled up.
        scale_bytes: bytes of a scale.
    """

    bits: int
    group: int = 1
    scale_bytes: int = 0

    @property
    def group_bytes(self) -> int:
        """Bytes of a group, its scale included."""
        return self.bits * self.group // 8 + self.scale_bytes

    def groups(self, entries: int) -> int:
        """Groups of a message of ``entries``."""
        return -(-entries // self.group)

    def bytes(self, entries: int) -> int:
        """Bytes of a message of ``entries``."""
        return self.groups(entries) * self.group_bytes

    def share(self, entries: int, worker: int, workers: int) -> tuple[int, int]:
        """First group, and the one after the last, that ``worker`` averages for all."""
        groups = self.groups(entries)
        return groups * worker // workers, groups * (worker + 1) // workers

    def mean_bytes(self, entries: int, worker: int, workers: int) -> int:
        """Bytes that ``worker`` sends for a mean: the others' shares to them, and its own share to all of them."""
        first, last = self.share(entries, worker, workers)
        mine = last - first
        return (self.groups(entries) - mine + mine * (workers - 1)) * self.group_bytes


WIRE_FORMATS: dict[str, WireFormat | None] = {
    "fp32": None,
    "bf16": WireFormat(16),
    "int8": WireFormat(8, group=256, scale_bytes=4),
    "int6": WireFormat(6, group=256, scale_bytes=4),
    "int4": WireFormat(4, group=256, scale_bytes=4),
}
"""By name; None sends every tensor in its own data type."""


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
    """

    shared: Mapping[str, int]
    blocks: tuple[int, ...]
    averaged: tuple[Mapping[str, int], ...]
    states: tuple[int, ...]
    wire: WireFormat | None = None
    shared_entries: int = 0
    block_entries: tuple[int, ...] = ()


def sync_bytes(plan: SyncPlan, sizes: Sizes, workers: int) -> list[dict[str, int]]:
    """Bytes that each worker sends in a sync, by kind: section 5 of the design, exactly.

    Blocks that all workers hold before and after join the all-reduce of the shared layers and count as ``shared``.

    Args:
        plan: the plan of the sync.
        sizes: bytes of the model's parts.
        workers: number of workers.

    Returns:
        For each worker, the bytes sent of the kinds ``shared``, ``merge``, ``hand_over`` and ``state``.
    """
    reduced = Counter(sizes.shared)
    for block in plan.averaged:
        reduced.update(sizes.averaged[block])
    shared = sum(all_reduce_bytes(size, workers) for size in reduced.values())
    merge = _sent(plan.merge, sizes.blocks)
    hand_over = _sent(plan.hand_over, sizes.blocks)
    state = _sent((*plan.merge, *plan.hand_over), sizes.states)
    return [
        {
            "shared": shared + _compressed_mean(plan, sizes, worker, workers),
            "merge": merge[worker],
            "hand_over": hand_over[worker],
            "state": state[worker],
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

"""Bytes by closed form: what the methods must send, to stand beside what was counted. Standard library only.

Bytes are decimal and count what a worker *sends*; what it receives is the same in total.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resist_lightning.plan import SyncPlan, Transfer

KINDS = ("shared", "merge", "hand_over", "state", "evaluation", "checkpoint", "start", "control")
"""Kinds of bytes: training (``shared`` layers, ``merge``, ``hand_over``, optimizer ``state``), observation
(``evaluation``, ``checkpoint``), once at the ``start``, and ``control`` (headers)."""

TRAINING_KINDS = ("shared", "merge", "hand_over", "state")


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
class Sizes:
    """Bytes of a model's parts; those that are averaged, by name of the data type.

    Args:
        shared: bytes of the shared tensors that are averaged.
        blocks: bytes of each partitionable block, its buffers included; all data types together.
        averaged: bytes of each block that an average of it sends: all but frozen parameters.
        states: bytes of the optimizer state that travels with each block; 0 unless momentum travels.
    """

    shared: Mapping[str, int]
    blocks: tuple[int, ...]
    averaged: tuple[Mapping[str, int], ...]
    states: tuple[int, ...]


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
    return [
        {
            "shared": shared,
            "merge": _sent(plan.merge, sizes.blocks, worker),
            "hand_over": _sent(plan.hand_over, sizes.blocks, worker),
            "state": _sent((*plan.merge, *plan.hand_over), sizes.states, worker),
        }
        for worker in range(workers)
    ]


def _sent(transfers: Sequence[Transfer], sizes: Sequence[int], worker: int) -> int:
    return sum(sizes[transfer.block] for transfer in transfers if transfer.source == worker)

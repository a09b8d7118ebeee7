"""Closed forms of the bytes that workers send; `methods/*/bytes.py` combine them into those of a sync.

`Collective.sent_bytes` counts them as they are sent.
Bytes are decimal and count what a worker *sends*; what it receives is the same in total. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

SYNC_KINDS = ("shared", "merge", "hand_over", "state", "outer")

TRAINING_KINDS = (*SYNC_KINDS, "boundary", "output")

KINDS = (*TRAINING_KINDS, "evaluation", "checkpoint", "start", "control")
"""Kinds of bytes: training (``shared`` layers, ``merge``, ``hand_over``, optimizer ``state``, velocities of an
``outer`` optimizer; between stages, tensors at a ``boundary``, and the network's ``output``), observation
(``evaluation``, ``checkpoint``), once at the ``start``, and ``control`` (headers)."""


def all_reduce_bytes(payload_bytes: int, workers: int) -> int:
    """Bytes that one worker sends in an all-reduce of ``payload_bytes``: 2 (S - 1) / S of them, rounded up."""
    # A ring passes each part on to all but one worker, twice: to sum it up, and to distribute the sum.
    return _divided_up(2 * (workers - 1) * payload_bytes, workers)


def ddp_bytes(model_bytes: int, workers: int, steps: int) -> int:
    """Bytes that one worker of data-parallel training sends: all gradients, in every step."""
    return steps * all_reduce_bytes(model_bytes, workers)


def local_sgd_bytes(model_bytes: int, workers: int, rounds: int) -> int:
    """Bytes that one worker of local SGD sends: all parameters, once a round."""
    return rounds * all_reduce_bytes(model_bytes, workers)


@dataclass(frozen=True)
class WireFormat:
    """Layout of quantized parameters in a message: groups of entries, with a scale each.

    Args:
        bits: bits of an entry.
        group: entries that share a scale; the last group of a message is filled up.
        scale_bytes: bytes of a scale.
        feedback: whether rounding errors of a mean are added to the next one (error feedback).
        values: the format of values themselves, if other than that of changes.
        vectors: the format in which tensors of less than two dimensions are averaged, if other than that of matrices.
    """

    bits: int
    group: int = 1
    scale_bytes: int = 0
    feedback: bool = False
    values: WireFormat | None = None
    vectors: WireFormat | None = None

    @property
    def for_values(self) -> WireFormat:
        """The format of handed-over blocks, of which the next holder has no earlier values."""
        return self.values or self

    @property
    def group_bytes(self) -> int:
        """Bytes of a group, its scale included."""
        return self.bits * self.group // 8 + self.scale_bytes

    def groups(self, entries: int) -> int:
        """Groups of a message of ``entries``."""
        return _divided_up(entries, self.group)

    def bytes(self, entries: int) -> int:
        """Bytes of a message of ``entries``."""
        return self.groups(entries) * self.group_bytes

    def share(self, entries: int, worker: int, workers: int) -> tuple[int, int]:
        """First group, and the one after the last, that ``worker`` averages for all."""
        groups = self.groups(entries)
        # Neighbouring shares meet, whatever the remainder.
        return groups * worker // workers, groups * (worker + 1) // workers

    def mean_bytes(self, matrices: int, vectors: int, worker: int, workers: int) -> int:
        """Bytes that ``worker`` sends for a mean of so many entries.

        Args:
            matrices: entries of tensors of two dimensions or more.
            vectors: entries of the others.
            worker: the sender.
            workers: number of workers.
        """
        if self.vectors is None:
            return self._mean_bytes(matrices + vectors, worker, workers)
        return self._mean_bytes(matrices, worker, workers) + self.vectors._mean_bytes(vectors, worker, workers)

    def _mean_bytes(self, entries: int, worker: int, workers: int) -> int:
        """Bytes of the others' shares, each sent to its worker, and of the own share, sent to all of them."""
        first, last = self.share(entries, worker, workers)
        own = last - first
        others = self.groups(entries) - own
        return (others + own * (workers - 1)) * self.group_bytes


WIRE_FORMATS: dict[str, WireFormat | None] = {
    "fp32": None,
    "bf16": WireFormat(16),
    "int8": WireFormat(8, group=256, scale_bytes=4),
    "int6": WireFormat(6, group=256, scale_bytes=4),
    "int4": WireFormat(4, group=256, scale_bytes=4),
    "int2": WireFormat(
        2,
        group=512,
        scale_bytes=4,
        feedback=True,
        values=WireFormat(8, group=256, scale_bytes=4),
        vectors=WireFormat(32),
    ),
}
"""By name; None sends every tensor in its own data type."""


def _divided_up(number: int, by: int) -> int:
    """The quotient, rounded up, in integers: a float would be inexact for large models."""
    return (number + by - 1) // by


def share_of(worker_bytes: int, member: int, members: int) -> int:
    """The bytes of a worker that one member sends; over all members they add up to ``worker_bytes``."""
    return worker_bytes * (member + 1) // members - worker_bytes * member // members

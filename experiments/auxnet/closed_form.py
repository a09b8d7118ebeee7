"""Closed forms: bytes that a worker sends in a step and holds while it trains, and the speed-up of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

ITEM = 4  # bytes of a float32


def sent_bytes(method: str, batch: int, elements: Sequence[int], classes: int) -> list[int]:
    """Bytes that each worker sends in a step.

    At a boundary one tensor goes up and one comes down: an activation and its gradient, or a stage's output and the
    guess of it. AuxNet's last worker sends the network's output to all others, for their losses and metrics.
    ``elements`` are the numbers of one sample at each boundary.
    """
    workers = len(elements) + 1
    sent = [0] * workers
    for boundary, numbers in enumerate(elements):
        sent[boundary] += batch * numbers * ITEM
        sent[boundary + 1] += batch * numbers * ITEM
    if method != "pipeline" and workers > 1:
        sent[-1] += batch * classes * ITEM * (workers - 1)
    return sent


def held_bytes(parameters: Sequence[int], aux_parameters: Sequence[int], *, delayed: bool = False) -> list[int]:
    """Bytes of parameters, gradients and momentum of each worker: of its stage and of its auxiliary network.

    With late gradients, copies of the weights too: of every batch whose gradient is to come, and before the last step.
    """
    held = [3 * ITEM * (own + aux) for own, aux in zip(parameters, aux_parameters, strict=True)]
    if delayed:
        for stage in range(len(parameters) - 1):
            late = len(parameters) - 1 - stage
            held[stage] += (late + 1) * ITEM * parameters[stage]
    return held


def hybrid_speed_up(speed_up: float, every: int) -> float:
    """Speed-up where one of ``every`` steps is as long as in one process, and the others ``speed_up`` times as fast."""
    return every / ((every - 1) / speed_up + 1)


def pipeline_speed_up(workers: int, micro_batches: int, compute: float, data: float = 0.0) -> float:
    """Speed-up of a pipeline of equally long stages over one process.

    ``compute`` is the seconds of forward and backward of the whole network on a whole batch, ``data`` those of making
    the batch, which every worker needs.
    """
    ramps = (micro_batches + workers - 1) / micro_batches  # a stage waits for K - 1 micro-batches at both ends together
    return (data + compute) / (data + compute / workers * ramps)

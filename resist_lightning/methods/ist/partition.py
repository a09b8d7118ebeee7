"""Deals hidden neurons to workers, and says which worker stores the rows that nobody trains. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from resist_lightning.schedule.partition import Partition, blocks_per_worker, deal


def draw_neurons(widths: Sequence[int], workers: int, seed: int, round: int) -> tuple[Partition, ...]:
    """Deal the neurons of every hidden layer (section 2.1 of the specification of IST).

    Each neuron goes to exactly one worker, each layer is dealt in an order of its own, and shares differ by at most
    one neuron.

    Args:
        widths: neurons of each hidden layer, at least as many as workers.
        workers: number of workers, at least 1.
        seed: seed of the whole run.
        round: number of the round, counted from 0.

    Returns:
        One partition per layer; the same on every machine.
    """
    partitions = []
    for layer, width in enumerate(widths):
        counts = blocks_per_worker(width, workers, 0)
        # The number, not the name: the order of a layer must survive a renaming.
        partitions.append(deal(width, counts, seed, round, f"neuron of layer {layer}"))
    return tuple(partitions)


def kept_rows(width: int, workers: int, worker: int) -> range:
    """The rows of inner matrices for which ``worker`` is the keeper: the same in all rounds.

    An inner matrix has hidden neurons on both sides. Of row i, which belongs to a neuron of its output, only the
    columns of neurons that the holder of i has too are trained in a round; its keeper stores the rest of the row.
    """
    return range(width * worker // workers, width * (worker + 1) // workers)

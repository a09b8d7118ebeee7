"""Deals hidden neurons to workers, and rows that nobody trains to their keepers. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from resist_lightning.schedule.partition import Partition, blocks_per_worker, deal
from resist_lightning.schedule.stages import NO_STAGES, Stages, parts_of


@dataclass(frozen=True)
class NeuronSchedule:
    """The partitions of all rounds of a run; immutable, and equal on all workers.

    Args:
        widths: number of neurons of each hidden layer.
        workers: number of workers.
        seed: seed of the whole run.
        min_share: least share of the neurons of each layer that a worker holds.
        stages: least shares in other rounds, by growth or at the end.
    """

    widths: tuple[int, ...]
    workers: int
    seed: int
    min_share: float = 0.0
    stages: Stages = NO_STAGES

    def partitions(self, round: int) -> tuple[Partition, ...]:
        """The partition of each layer in ``round``."""
        return draw_neurons(self.widths, self.workers, self.seed, round, self._share(round))

    def counts(self, round: int) -> list[tuple[int, ...]]:
        """For each layer, the number of neurons that each worker holds in ``round``."""
        return [neurons_per_worker(width, self.workers, self._share(round)) for width in self.widths]

    def state_dict(self) -> dict[str, Any]:
        """The shares of the neurons, as plain data for a checkpoint; empty for equal shares in all rounds."""
        if self == NeuronSchedule(self.widths, self.workers, self.seed):
            return {}
        stages = self.stages
        shares = [list(entry) for entry in stages.shares]
        return {"min_share": self.min_share, "shares": shares, "finish_from": stages.finish_from}

    def of(self, workers: int, seed: int, table: Mapping[str, Any]) -> NeuronSchedule:
        """The schedule of another run of the same network, from its :meth:`state_dict`."""
        shares = tuple((int(first), float(share)) for first, share in table.get("shares", []))
        stages = Stages(shares, table.get("finish_from"))
        return NeuronSchedule(self.widths, workers, seed, table.get("min_share", 0.0), stages)

    def _share(self, round: int) -> float:
        return self.stages.least(round, self.min_share)


def neurons_per_worker(width: int, workers: int, min_share: float) -> tuple[int, ...]:
    """Number of neurons of a layer that each worker holds: an equal share, but never less than the least one."""
    least = parts_of(min_share, width) if min_share else 0
    return blocks_per_worker(width, workers, least)


@lru_cache(maxsize=8)  # a sync asks again and again for the partitions of two rounds
def draw_neurons(
    widths: tuple[int, ...], workers: int, seed: int, round: int, min_share: float = 0.0
) -> tuple[Partition, ...]:
    """Deal the neurons of every hidden layer (IST, arXiv 1910.02120).

    Each neuron goes to exactly one worker, or, where ``min_share`` is above 1 / workers, to several, as evenly as can
    be. Each layer is dealt in an order of its own, and shares differ by at most one neuron.

    Args:
        widths: number of neurons of each hidden layer, at least that of workers.
        workers: number of workers, at least 1.
        seed: seed of the whole run.
        round: number of the round, counted from 0.
        min_share: least share of the neurons of each layer that a worker holds, from 0 to 1.

    Returns:
        One partition per layer; the same on every machine.
    """
    partitions = []
    for layer, width in enumerate(widths):
        counts = neurons_per_worker(width, workers, min_share)
        # Keyed by the number, not the name: the order of a layer must survive a renaming.
        what = f"neuron of layer {layer}"
        # Else the same workers would share neurons in all layers: fewer entries would train, by more workers each.
        turns = f"worker of layer {layer}" if sum(counts) > width else "worker"
        partitions.append(deal(width, counts, seed, round, what, turns=turns))
    return tuple(partitions)


def kept_rows(width: int, workers: int, worker: int) -> range:
    """The rows of inner matrices for which ``worker`` is the keeper: the same in all rounds.

    An inner matrix has hidden neurons on both sides. In row i, which belongs to a neuron of its output, only the
    columns of neurons that the holder of i has too are trained in a round; its keeper stores the rest of the row.
    """
    return range(width * worker // workers, width * (worker + 1) // workers)

"""Chooses who watches whom, so that all workers together cost the store O(workers) a second. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from resist_lightning.faults.messages import Process

NEIGHBOURS = 8
"""Number of processes of its host that a worker watches: all on usual hosts. A monitor watches all on any host."""


def choose_monitors(processes: Sequence[Process]) -> list[int]:
    """The ranks that read all heartbeats: worker 0, and one that is unlikely to be lost together with it."""
    first, *others = processes
    if not others:
        return [first.worker]
    second = next((process for process in others if process.home != first.home), others[0])
    return [first.worker, second.worker]


def choose_neighbours(processes: Sequence[Process], worker: int) -> list[Process]:
    """The processes of its host that ``worker`` watches: the next ones, in a ring."""
    here = [process for process in processes if process.home == processes[worker].home]
    own = here.index(processes[worker])
    others = here[own + 1 :] + here[:own]
    return others if worker in choose_monitors(processes) else others[:NEIGHBOURS]

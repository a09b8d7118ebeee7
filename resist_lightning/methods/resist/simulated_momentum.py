"""Optimizer state at a sync of the reference simulator, by name of the parameter."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from resist_lightning.methods.simulation import SimulatedWorker, mean_state

Momenta: TypeAlias = dict[tuple[int, str, str], Any]
"""Optimizer state, by number of the optimizer, name of the parameter, and slot."""


def block_momenta(
    workers: Sequence[SimulatedWorker], held: Sequence[Sequence[int]], block_of: Mapping[str, int]
) -> Momenta:
    """Optimizer state of the blocks, mean over holders.

    Args:
        workers: the simulated workers.
        held: blocks of each worker.
        block_of: the block of each tensor that is not shared, by name.
    """
    gathered: dict[tuple[int, str, str], list[Any]] = {}
    for worker, blocks in zip(workers, held, strict=True):
        for name, parameter in worker.module.named_parameters():
            if block_of.get(name) not in blocks:
                continue
            for number, optimizer in enumerate(worker.optimizers):
                for slot, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor | int | float):
                        gathered.setdefault((number, name, slot), []).append(value)
    return {key: mean_state(values) for key, values in gathered.items()}


def forget_momenta(worker: SimulatedWorker, names: Collection[str]) -> None:
    """Restart the state of some parameters."""
    for optimizer in worker.optimizers:
        for name, parameter in worker.module.named_parameters():
            if name in names:
                optimizer.state.pop(parameter, None)


def move_momenta(
    worker: SimulatedWorker,
    block_of: Mapping[str, int],
    covered: Collection[str],
    kept: Collection[int],
    holds: Collection[int],
    momenta: Momenta,
) -> None:
    """Let a worker keep the state of blocks that stay, and get that of blocks that arrive.

    Args:
        worker: the worker.
        block_of: the block of each tensor that is not shared, by name.
        covered: names of the tensors that the sync covers.
        kept: blocks whose state stays.
        holds: its blocks after the sync.
        momenta: state that comes with blocks; empty where none does.
    """
    for number, optimizer in enumerate(worker.optimizers):
        for name, parameter in worker.module.named_parameters():
            block = block_of.get(name)
            if block is None or block in kept or name not in covered:
                continue
            optimizer.state.pop(parameter, None)
            if block not in holds:
                continue
            slots = {s: copy.deepcopy(v) for (n, owner, s), v in momenta.items() if (n, owner) == (number, name)}
            if slots:
                optimizer.state[parameter] = slots

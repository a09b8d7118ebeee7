"""Simulated workers, for the reference simulators: many in one process, with means over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.comm.packing import flatten, split
from resist_lightning.comm.quantize import arrange
from resist_lightning.comm.tensors import computable, is_continuous, named_tensors
from resist_lightning.methods.config import CommonConfig
from resist_lightning.methods.residual import Block
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.batch_norm import Call, recalibrate
from resist_lightning.state.input_recorder import InputRecorder
from resist_lightning.state.optimizer_state import first_rate


@dataclass
class SimulatedWorker:
    """A simulated worker: train ``module`` with ``optimizers``, as if it were alone.

    Args:
        module: a complete copy of the network; blocks that the worker lacks are skipped.
        optimizers: the worker's optimizers.
        blocks: the partitionable blocks of ``module``.
        recorder: records the last training inputs.
    """

    module: nn.Module
    optimizers: list[Optimizer]
    blocks: tuple[Block, ...]
    recorder: InputRecorder

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; caches that forwards register or resize are as they were at the start."""
        now = named_tensors(self.module)
        grown = {name for name, tensor in self._at_start.items() if name not in now or now[name].shape != tensor.shape}
        return {name: tensor if name in grown else now[name] for name, tensor in self._at_start.items()}

    def copies(self) -> dict[str, Tensor]:
        """Copies of :meth:`tensors`."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def __post_init__(self) -> None:
        self._at_start = named_tensors(self.module)
        # By optimizer and group: values that steps have changed, as they were before.
        self._first: list[list[dict[str, Any]]] = [[{} for _ in o.param_groups] for o in self.optimizers]
        for optimizer, first in zip(self.optimizers, self._first, strict=True):
            # Only around steps: schedules change the same values, and those changes stay.
            optimizer.register_step_pre_hook(lambda o, *_, first=first: _remember(o, first))
            optimizer.register_step_post_hook(lambda o, *_, first=first: _forget_unchanged(o, first))

    def restart_optimizers(self) -> None:
        """Clear the optimizers' state, and restore the values in parameter groups that their own steps have changed."""
        for optimizer, first in zip(self.optimizers, self._first, strict=True):
            optimizer.state.clear()
            for group, values in _of_groups(optimizer, first):
                group.update(values)
                values.clear()


def _of_groups(optimizer: Optimizer, first: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each parameter group, with its remembered values; groups may have been added since the last call."""
    first += [{} for _ in optimizer.param_groups[len(first) :]]
    return zip(optimizer.param_groups, first, strict=True)


def _remember(optimizer: Optimizer, first: list[dict[str, Any]]) -> None:
    for group, values in _of_groups(optimizer, first):
        for name, value in group.items():
            if isinstance(value, int | float):
                values.setdefault(name, value)


def _forget_unchanged(optimizer: Optimizer, first: list[dict[str, Any]]) -> None:
    for group, values in _of_groups(optimizer, first):
        unchanged = [name for name, value in values.items() if group[name] == value]
        for name in unchanged:
            del values[name]


def clock_of(
    config: CommonConfig, workers: Sequence[SimulatedWorker], overlap_of: Callable[[int], int] = lambda _: 0
) -> Clock:
    """The clock of a simulated run, whose rounds may follow the learning rate.

    Args:
        config: the settings.
        workers: the simulated workers.
        overlap_of: gives, for a round, the local steps at its end during which its sync is under way.

    Raises:
        ValueError: when a round begins, if the workers train at different rates, so that its length is not known.
    """

    def rate() -> float | None:
        rates = [first_rate(worker.optimizers) for worker in workers]
        if len(set(rates)) > 1:
            raise ValueError(
                f"local_steps={config.local_steps}: the workers' learning rates differ ({rates}). Give all of them the "
                "same schedule, or local_steps a number."
            )
        return rates[0]

    return Clock.by(config.local_steps, rate, overlap_of)


def mean_or_maximum(values: Sequence[Tensor]) -> Tensor:
    """The mean of the holders' values; for integers and booleans the maximum."""
    numbers = torch.stack([computable(value.detach()) for value in values])
    if not is_continuous(values[0].dtype):
        return numbers.amax(0).to(values[0].dtype)
    mean = numbers.mean(0)
    # A sum of large equal values overflows, such as those of a mask; workers do not average what is equal.
    mean = torch.where(mean.isfinite() | (numbers != numbers[0]).any(0), mean, numbers[0])
    return torch.view_as_complex(mean) if values[0].is_complex() else mean.to(values[0].dtype)


def mean_state(values: list[Any]) -> Any:
    """The mean of optimizer state: of tensors, by :func:`mean_or_maximum`, or of Python numbers in their own type."""
    if isinstance(values[0], Tensor):
        return mean_or_maximum(values)
    mean = sum(values) / len(values)
    return mean if isinstance(values[0], float) else type(values[0])(round(mean))


def flat_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors flattened into one, in the order of a compressed message."""
    return flatten(arrange(tensors.values()))


def pieces_of(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`flat_of`."""
    names = {id(tensor): name for name, tensor in like.items()}
    tensors = arrange(like.values())
    return {names[id(t)]: piece for t, piece in zip(tensors, split(flat, tensors), strict=True)}


def recalibrate_together(workers: Sequence[SimulatedWorker], full: nn.Module) -> None:
    """Give the full model the mean of the batch-norm statistics that each worker estimates on its own inputs."""
    still = workers[0].recorder.still
    statistics: list[list[Tensor]] = []
    for worker in workers:
        # Recorded inputs belong to modules of the worker's copy; they are replayed through those of the full model.
        twins = dict(zip(worker.module.modules(), full.modules(), strict=True))
        calls: list[Call] = [(twins[called], args, kwargs) for called, args, kwargs in worker.recorder.calls]
        own = recalibrate(full, calls, torch.no_grad, still)
        statistics.append([tensor.clone() for tensor in own])
    # The last worker's are still in the full model, whose tensors get the mean.
    for tensor, *values in zip(own, *statistics, strict=True):
        tensor.copy_(torch.stack(values).mean(0))

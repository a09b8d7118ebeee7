"""A worker of a simulation, and what all of them do together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.blocks import Block
from resist_lightning.norm import Call, InputRecorder, norms_with_statistics, recalibrate


@dataclass
class SimulatedWorker:
    """One worker: train ``module`` with ``optimizers``, as if it were alone.

    Args:
        module: a complete copy of the network; blocks that the worker lacks are skipped.
        optimizers: the worker's optimizers.
        blocks: the partitionable blocks of ``module``.
        recorder: remembers the last training inputs.
    """

    module: nn.Module
    optimizers: list[Optimizer]
    blocks: tuple[Block, ...]
    recorder: InputRecorder

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}


def recalibrate_together(workers: Sequence[SimulatedWorker], full: nn.Module) -> None:
    """Batch-norm statistics of the full model: each worker re-estimates them on its inputs; then the mean."""
    still = workers[0].recorder.still
    statistics: list[list[Tensor]] = []
    for worker in workers:
        twins = dict(zip(worker.module.modules(), full.modules(), strict=True))
        calls: list[Call] = [(twins[called], args, kwargs) for called, args, kwargs in worker.recorder.calls]
        statistics.append([tensor.clone() for tensor in recalibrate(full, calls, torch.no_grad, still)])
    norms = [norm for name, norm in norms_with_statistics(full).items() if name not in still]
    own = [getattr(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    for tensor, *values in zip(own, *statistics, strict=True):
        tensor.copy_(torch.stack(values).mean(0))

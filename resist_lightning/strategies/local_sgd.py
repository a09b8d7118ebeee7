"""``Trainer(strategy="local_sgd")``."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch

from resist_lightning.methods.config import CheckPolicy, NonFinitePolicy, WireName, check_choice
from resist_lightning.methods.resist.config import Config
from resist_lightning.strategies.base import DataPolicy, SubnetStrategy
from resist_lightning.strategies.launching.guard import DEFAULT_SILENCE
from resist_lightning.strategies.launching.launchers import DEFAULT_TIMEOUT, Launch, StartMethod
from resist_lightning.strategies.saving.restarts import SaveErrors, Saving, WorkerLoss


class LocalSGDStrategy(SubnetStrategy):
    """Local SGD: the full model on every worker, averaged once a round. The engine of ResIST with nothing partitioned.

    Args:
        local_steps: local steps per round, at least 1.
        momentum: what happens to optimizer state at a sync: ``"reset"`` or ``"keep"``.
        wire: how trainable parameters are sent at a sync: ``"fp32"`` (as they are), ``"bf16"``, ``"int8"``, ``"int6"``
            or ``"int4"``; all but the first need one more copy of the parameters on each worker.
        check: which entries of the shared tensors are hashed after each sync, and compared between workers:
            ``"sampled"`` (one in 64 of large tensors, others each round), ``"full"`` or ``"off"``.
        non_finite: what happens when a worker comes to a sync with NaN or infinity: ``"raise"``, or ``"drop"`` (it is
            left out of the means of that round).
        data: ``"shard"`` (each worker sees its part of the training set) or ``"copy"`` (each sees all of it).
        on_save_error: what happens where a checkpoint cannot be written, e.g. to a full disk: ``"raise"`` ends the
            training on all workers, ``"warn"`` goes on; the checkpoint before it stays as it is.
        snapshots: a folder to which every worker writes what it holds at the border of a round, best one that all can
            read; when torchrun starts the workers again, they go on from the newest by themselves. Removed at the end
            of the training. None: no snapshots.
        snapshot_every_n_rounds: write one where every so many rounds begin, at least 1.
        on_worker_loss: what happens where torchrun starts again with another number of workers: ``"stop"``, or
            ``"shrink"`` (go on with those that are there; needs ``snapshots``).
        parallel_devices: devices of this host's workers where ``Trainer(devices=...)`` cannot say it.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default NCCL on GPUs, gloo on the CPU and for several
            workers on one GPU.
        timeout: after how long a worker that waits for another one gives up; above the worst skew of a round.
        silence: after how long without a sign of life (one a second) a worker counts as lost: frozen, or on a host that
            cannot be reached. A worker that dies or fails is noticed within seconds.
        start_method: how Lightning starts workers: ``"popen"``, ``"spawn"``, ``"fork"``, ``"forkserver"``.

    Raises:
        ValueError: if a value is outside its limits.
    """

    strategy_name = "local_sgd"

    def __init__(
        self,
        *,
        local_steps: int = 50,
        momentum: Literal["reset", "keep"] = "reset",
        wire: WireName = "fp32",
        check: CheckPolicy = "sampled",
        non_finite: NonFinitePolicy = "raise",
        data: DataPolicy = "shard",
        on_save_error: SaveErrors = "raise",
        snapshots: str | os.PathLike[str] | None = None,
        snapshot_every_n_rounds: int = 1,
        on_worker_loss: WorkerLoss = "stop",
        parallel_devices: list[torch.device] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        silence: timedelta = DEFAULT_SILENCE,
        start_method: StartMethod = "popen",
    ) -> None:
        check_choice("momentum", momentum, ("reset", "keep"))
        super().__init__(
            Config(
                local_steps=local_steps,
                blocks=[],
                momentum=momentum,
                batch_norm="running",
                wire=wire,
                check=check,
                non_finite=non_finite,
            ),
            data,
            Saving(on_save_error, snapshots, snapshot_every_n_rounds, on_worker_loss),
            Launch(parallel_devices, process_group_backend, timeout, silence, start_method),
        )

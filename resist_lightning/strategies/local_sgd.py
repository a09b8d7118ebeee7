"""``Trainer(strategy="local_sgd")``."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import torch

from resist_lightning.config import Config, WireName, check_choice
from resist_lightning.strategies.launch import DEFAULT_TIMEOUT, StartMethod
from resist_lightning.strategies.subnet import DataPolicy, SubnetStrategy


class LocalSGDStrategy(SubnetStrategy):
    """Local SGD: the full model on every worker, averaged once a round. The engine of ResIST with nothing partitioned.

    Args:
        local_steps: local steps per round, at least 1.
        momentum: what happens to optimizer state at a sync: ``"reset"`` or ``"keep"``.
        wire: how trainable parameters are sent at a sync: ``"fp32"`` (as they are), ``"bf16"``, ``"int8"``, ``"int6"``
            or ``"int4"``; all but the first need one more copy of the parameters on each worker.
        data: ``"shard"`` (each worker sees its part of the training set) or ``"copy"`` (each sees all of it).
        parallel_devices: devices of this host's workers where ``Trainer(devices=...)`` cannot say it.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default NCCL on GPUs, gloo on the CPU and for several
            workers on one GPU.
        timeout: after how long a worker that waits for another one gives up; above the worst skew of a round.
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
        data: DataPolicy = "shard",
        parallel_devices: list[torch.device] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
    ) -> None:
        check_choice("momentum", momentum, ("reset", "keep"))
        super().__init__(
            Config(local_steps=local_steps, blocks=[], momentum=momentum, batch_norm="running", wire=wire),
            data=data,
            parallel_devices=parallel_devices,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

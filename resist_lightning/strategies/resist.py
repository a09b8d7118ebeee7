"""``Trainer(strategy="resist")``."""

from __future__ import annotations

from datetime import timedelta

import torch

from resist_lightning.config import BlockChoice, Config, MomentumPolicy, NormPolicy, WireName
from resist_lightning.strategies.launch import DEFAULT_TIMEOUT, StartMethod
from resist_lightning.strategies.subnet import DataPolicy, SubnetStrategy


class ResISTStrategy(SubnetStrategy):
    """Independent sub-networks of a residual network, one per worker (ResIST, arXiv 2107.00961).

    Each round, every worker trains the shared layers and a random part of the residual blocks for ``local_steps``
    steps without talking; then shared layers are averaged, blocks are handed over, and a new partition is drawn.
    For evaluation, for checkpoints and after ``fit`` the module is the full model, on every worker.

    Args:
        local_steps: local steps per round, at least 1. A local step is a batch in which an optimizer stepped.
        min_blocks: least number of partitioned blocks per worker (default 5, or all blocks where there are fewer).
        blocks: which residual blocks are partitioned: None (section 3 without its first block, as in the paper), a
            glob or several over module names such as ``"layer3.*"``, or a predicate of (name, module).
        seed: seed of the partitions; 0 is a seed.
        momentum: what happens to optimizer state at a sync: ``"reset"`` (as in the paper), ``"keep"`` or ``"travel"``.
        batch_norm: batch-norm statistics of the full model: ``"recalibrate"``, ``"running"`` or ``"batch"``.
        warmup_rounds: first rounds with all blocks on all workers, scaled as at test time.
        test_scale: factor on residual branches of partitioned blocks in the full model, in (0, 1]; default: mean
            blocks per worker / number of blocks. The paper's text has 1 / workers.
        wire: how trainable parameters are sent at a sync: ``"fp32"`` (as they are), ``"bf16"``, ``"int8"``, ``"int6"``
            or ``"int4"``; all but the first need a copy of the shared parameters on each worker.
        data: ``"shard"`` (each worker sees its part of the training set) or ``"copy"`` (each sees all of it, in its own
            order, as in the paper).
        parallel_devices: devices of this host's workers where ``Trainer(devices=...)`` cannot say it, e.g. one GPU
            several times.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default NCCL on GPUs, gloo on the CPU and for several
            workers on one GPU.
        timeout: after how long a worker that waits for another one gives up; above the worst skew of a round.
        start_method: how Lightning starts workers: ``"popen"`` (the script again), ``"spawn"``, ``"fork"``,
            ``"forkserver"``; under torchrun leave ``"popen"``.

    Raises:
        ValueError: if a value is outside its limits.
    """

    strategy_name = "resist"

    def __init__(
        self,
        *,
        local_steps: int = 50,
        min_blocks: int | None = None,
        blocks: BlockChoice = None,
        seed: int = 0,
        momentum: MomentumPolicy = "reset",
        batch_norm: NormPolicy = "recalibrate",
        warmup_rounds: int = 0,
        test_scale: float | None = None,
        wire: WireName = "fp32",
        data: DataPolicy = "shard",
        parallel_devices: list[torch.device] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
    ) -> None:
        if blocks is not None and not callable(blocks) and not len(blocks):
            raise ValueError("blocks is empty, so nothing would be partitioned; use strategy='local_sgd' for that.")
        config = Config(
            local_steps=local_steps,
            min_blocks=min_blocks,
            blocks=blocks,
            seed=seed,
            momentum=momentum,
            batch_norm=batch_norm,
            warmup_rounds=warmup_rounds,
            test_scale=test_scale,
            wire=wire,
        )
        super().__init__(
            config,
            data=data,
            parallel_devices=parallel_devices,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

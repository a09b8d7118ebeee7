"""``Trainer(strategy="resist")``."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from resist_lightning.methods.config import CheckPolicy, MomentumPolicy, NonFinitePolicy, NormPolicy, WireName
from resist_lightning.methods.resist.config import BlockChoice, BlockCounts, Config
from resist_lightning.strategies.base import DataPolicy, SubnetStrategy
from resist_lightning.strategies.launching.guard import DEFAULT_SILENCE
from resist_lightning.strategies.launching.launchers import DEFAULT_TIMEOUT, Launch, StartMethod
from resist_lightning.strategies.saving.restarts import SaveErrors, Saving, WorkerLoss


class ResISTStrategy(SubnetStrategy):
    """Independent sub-networks of a residual network, one per worker (ResIST, arXiv 2107.00961).

    Each round, every worker trains the shared layers and a random part of the residual blocks for ``local_steps``
    steps without talking; then shared layers are averaged, blocks are handed over, and a new partition is drawn.
    For evaluation, for checkpoints and after ``fit`` the module is the full model, on every worker.

    Args:
        local_steps: local steps per round, at least 1. A local step is a batch in which an optimizer stepped.
        min_blocks: least number of partitioned blocks per worker (default 5, or all blocks where there are fewer).
        blocks_per_worker: how many each worker holds: ``"equal"``, ``"auto"`` (in proportion to the speed that each
            worker shows in the first rounds, within ``min_blocks``), or a list with a count for each worker.
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
        check: which entries of the shared tensors are hashed after each sync, and compared between workers:
            ``"sampled"`` (one in 64 of large tensors, others each round), ``"full"`` or ``"off"``.
        non_finite: what happens when a worker comes to a sync with NaN or infinity: ``"raise"``, or ``"drop"`` (it is
            left out of the means of that round; its own blocks are again what they were when the round began, for
            which a copy of them is kept).
        data: ``"shard"`` (each worker sees its part of the training set) or ``"copy"`` (each sees all of it, in its own
            order, as in the paper).
        on_save_error: what happens where a checkpoint cannot be written, e.g. to a full disk: ``"raise"`` ends the
            training on all workers, ``"warn"`` goes on; the checkpoint before it stays as it is.
        snapshots: a folder to which every worker writes what it holds at the border of a round, best one that all can
            read; when torchrun starts the workers again, they go on from the newest by themselves. Removed at the end
            of the training. None: no snapshots.
        snapshot_every_n_rounds: write one where every so many rounds begin, at least 1.
        on_worker_loss: what happens where torchrun starts again with another number of workers: ``"stop"``, or
            ``"shrink"`` (go on with those that are there; needs ``snapshots``).
        parallel_devices: devices of this host's workers where ``Trainer(devices=...)`` cannot say it, e.g. one GPU
            several times.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default NCCL on GPUs, gloo on the CPU and for several
            workers on one GPU.
        timeout: after how long a worker that waits for another one gives up; above the worst skew of a round.
        silence: after how long without a sign of life (one a second) a worker counts as lost: frozen, or on a host that
            cannot be reached. A worker that dies or fails is noticed within seconds.
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
        blocks_per_worker: BlockCounts = "equal",
        blocks: BlockChoice = None,
        seed: int = 0,
        momentum: MomentumPolicy = "reset",
        batch_norm: NormPolicy = "recalibrate",
        warmup_rounds: int = 0,
        test_scale: float | None = None,
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
        if blocks is not None and not callable(blocks) and not len(blocks):
            raise ValueError("blocks is empty, so nothing would be partitioned; use strategy='local_sgd' for that.")
        config = Config(
            local_steps=local_steps,
            min_blocks=min_blocks,
            blocks_per_worker=blocks_per_worker,
            blocks=blocks,
            seed=seed,
            momentum=momentum,
            batch_norm=batch_norm,
            warmup_rounds=warmup_rounds,
            test_scale=test_scale,
            wire=wire,
            check=check,
            non_finite=non_finite,
        )
        super().__init__(
            config,
            data,
            Saving(on_save_error, snapshots, snapshot_every_n_rounds, on_worker_loss),
            Launch(parallel_devices, process_group_backend, timeout, silence, start_method),
        )

"""``Trainer(strategy="ist")``."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from resist_lightning.methods.config import CheckPolicy, MomentumPolicy, NonFinitePolicy, NormPolicy
from resist_lightning.methods.ist.config import LayerChoice, NeuronConfig
from resist_lightning.strategies.base import DataPolicy, SubnetStrategy
from resist_lightning.strategies.launching.guard import DEFAULT_SILENCE
from resist_lightning.strategies.launching.launchers import DEFAULT_TIMEOUT, Launch, StartMethod
from resist_lightning.strategies.saving.restarts import SaveErrors, Saving, WorkerLoss


class ISTStrategy(SubnetStrategy):
    """Independent subnets across the width of a fully connected network, one per worker (IST, arXiv 1910.02120).

    Each round, the neurons of every hidden layer are dealt out to the workers; inputs and outputs go to all. Every
    worker trains a network of full depth and 1 / workers of the width for ``local_steps`` steps without talking; then
    weights go back to the full model's place for them, and the neurons are dealt anew. Of a matrix between two hidden
    layers a worker trains 1 / workers² of the entries; what nobody trains in a round lives in the memory of one
    worker's host. For evaluation, for checkpoints and after ``fit`` the module is the full model, on every worker.

    The hidden layers are found in the module, which is not edited: `Linear`, norm, activation, dropout, `Linear` in any
    nesting, and convolutional chains, whose channels are neurons. For residual networks use ``strategy="resist"``.

    Args:
        local_steps: local steps per round, at least 1. A local step is a batch in which an optimizer stepped.
        layers: whose neurons are dealt out: None (those of all hidden layers), a glob or several over layer names such
            as ``"classifier.*"``, or a predicate of (name, module); other layers are shared whole.
        seed: seed of the partitions; 0 is a seed.
        momentum: what happens to optimizer state at a sync: ``"reset"``, ``"keep"`` (that of entries that stay with
            their worker) or ``"travel"`` (state goes with its entry, and is kept where nobody trains the entry).
        batch_norm: batch-norm statistics of the full model: ``"recalibrate"``, ``"running"`` or ``"batch"`` (as in the
            authors' code).
        check: which entries of the shared tensors are hashed after each sync, and compared between workers:
            ``"sampled"`` (one in 64 of large tensors, others each round), ``"full"`` or ``"off"``.
        non_finite: what happens when a worker comes to a sync with NaN or infinity: ``"raise"``, or ``"drop"`` (it is
            left out of the means of that round; its own weights are again what they were when the round began, for
            which a copy of them is kept).
        data: ``"shard"`` (each worker sees its part of the training set) or ``"copy"`` (each sees all of it, in its own
            order, as in the authors' code).
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

    strategy_name = "ist"

    def __init__(
        self,
        *,
        local_steps: int = 20,
        layers: LayerChoice = None,
        seed: int = 0,
        momentum: MomentumPolicy = "reset",
        batch_norm: NormPolicy = "recalibrate",
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
        config = NeuronConfig(
            local_steps=local_steps,
            layers=layers,
            seed=seed,
            momentum=momentum,
            batch_norm=batch_norm,
            check=check,
            non_finite=non_finite,
        )
        super().__init__(
            config,
            data,
            Saving(on_save_error, snapshots, snapshot_every_n_rounds, on_worker_loss),
            Launch(parallel_devices, process_group_backend, timeout, silence, start_method),
        )

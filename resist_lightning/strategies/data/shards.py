"""Divides the training data over the processes, for Lightning's samplers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler


def own_order(kwargs: Mapping[str, Any], members: int, seed: int) -> dict[str, Any]:
    """Arguments of a sampler that gives each worker all of the data, in an order of its own that its members share.

    Args:
        kwargs: those with which each process would get a shard: ``num_replicas`` and ``rank``.
        members: processes of each worker.
        seed: of the run; that of ``seed_everything`` is added, as Lightning takes it for shards.
    """
    worker, member = divmod(kwargs["rank"], members)
    workers = kwargs["num_replicas"] // members
    seed += int(os.environ.get("PL_GLOBAL_SEED", "0"))
    return {"num_replicas": members, "rank": member, "seed": seed * workers + worker}


def warn_without_own_order(loader: object, order: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Warn if a training loader has no sampler of Lightning's with a worker-specific order.

    Args:
        loader: as Lightning has prepared it.
        order: of :func:`own_order`.
        trainer: of this worker.
    """
    from resist_lightning.callbacks import SeedPerWorker  # here, as callbacks import strategies

    batches = getattr(loader, "batch_sampler", None)  # the user's own, if it has Lightning's sampler inside
    samplers = (getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler) and sampler.shuffle and order.items() <= vars(sampler).items():
            return
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, SeedPerWorker) for callback in callbacks):
        return
    rank_zero_warn(
        f"data='copy' has no effect: Lightning gives the training loader ({type(loader).__name__}) no order for each "
        "worker, because of use_distributed_sampler=False, overfit_batches, an IterableDataset, or a sampler of yours "
        "(DistributedSampler). Workers that draw the same random numbers train on the same batches; the callback "
        "SeedPerWorker(seed) gives each its own."
    )

"""Divides the training data over the processes, for Lightning's samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def own_order(kwargs: Mapping[str, Any], members: int, seed: int) -> dict[str, Any]:
    """Arguments of a sampler that gives each worker all of the data, in an order of its own that its members share.

    Args:
        kwargs: those with which each process would get a shard: ``num_replicas`` and ``rank``.
        members: processes of each worker.
        seed: of the run.
    """
    worker, member = divmod(kwargs["rank"], members)
    workers = kwargs["num_replicas"] // members
    return {"num_replicas": members, "rank": member, "seed": seed * workers + worker}

"""The methods by name, as strategies of Lightning's Trainer; the same for every experiment on links."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, Strategy

from experiments.links.options import METHOD
from resist_lightning import ISTStrategy, LocalSGDStrategy, ResISTStrategy

NEVER = 10**9
"""Local steps of a round that does not end: no communication."""


def make_strategy(
    method: str,
    *,
    local_steps: int,
    min_blocks: int | None,
    seed: int,
    timeout: float,
    neurons: bool = False,
    **more: Any,
) -> Strategy:
    """The strategy of a method.

    Args:
        method: a name that `METHOD` knows; ``none`` is a sub-network without communication.
        local_steps: local steps per round; DDP has no rounds.
        min_blocks: least number of blocks of a worker.
        seed: of the partitions.
        timeout: seconds that a worker waits for another one.
        neurons: whether the network is fully connected, so that its sub-networks are IST's and not ResIST's.
        more: further settings of the strategies of this package.
    """
    found = METHOD.fullmatch(method)
    assert found is not None
    limit = timedelta(seconds=timeout)
    if method == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=limit)
    settings: dict[str, Any] = {"process_group_backend": "gloo", "timeout": limit, **more}
    if found["wire"]:
        settings["wire"] = found["wire"]
    if found["base"] == "local_sgd":
        return LocalSGDStrategy(local_steps=local_steps, **settings)
    steps = NEVER if method == "none" else local_steps
    if neurons:
        return ISTStrategy(local_steps=steps, seed=seed, **settings)
    return ResISTStrategy(local_steps=steps, min_blocks=min_blocks, seed=seed, **settings)


def make_trainer(strategy: Strategy, workers: int, **settings: Any) -> L.Trainer:
    """A quiet trainer of one worker, whose peers are hosts of their own."""
    return L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=workers,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )

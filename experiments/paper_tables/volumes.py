"""Bytes of a round: by the paper's accounting, as in its Table 1, and as our workers send them to each other."""

from __future__ import annotations

from functools import partial
from statistics import mean
from typing import Any

import torch

from experiments.paper_tables.networks import TABLE_1_BLOCKS, WORKERS, on_meta, paper_network
from resist_lightning import Config
from resist_lightning.comm.byte_formulas import local_sgd_bytes
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.transfers import plan_sync
from resist_lightning.state.optimizer_state import OptimizerStates

GB = 1e9

# Table 1 of the paper, GB per round.
PRINTED = {
    "local_sgd": {2: 0.662, 4: 1.325, 8: 2.649},
    "resist": {2: 0.454, 4: 0.720, 8: 1.289},
}


def table_1(workers: int) -> dict[str, Any]:
    """The paper's accounting of one round: every worker sends and receives its sub-network."""
    layout = _layout(workers, TABLE_1_BLOCKS[workers], statistics=False)
    shared = sum(tensor.nbytes for tensor in layout.shared.values())
    blocks = [sum(tensor.nbytes for tensor in block.tensors().values()) for block in layout.blocks]
    held = layout.schedule.partition(0).held
    subnets = [shared + sum(blocks[block] for block in mine) for mine in held]
    return {
        "workers": workers,
        "held": [len(mine) for mine in held],
        "local_sgd_bytes": 2 * workers * (shared + sum(blocks)),
        "resist_bytes": 2 * sum(subnets),
        "printed_gb": {method: printed[workers] for method, printed in PRINTED.items()},
    }


def peer_to_peer(workers: int, rounds: int) -> dict[str, Any]:
    """Bytes that all our workers together send in a round: a mean over the plans of many rounds.

    ``same_blocks`` has as many blocks per worker as Table 1 and no running statistics, like the paper's network;
    ``defaults`` has our default minimum and PyTorch's batch norm, whose statistics are averaged too.
    """
    same = _layout(workers, TABLE_1_BLOCKS[workers], statistics=False)
    model_bytes = sum(parameter.nbytes for parameter in same.module.parameters())
    return {
        "workers": workers,
        "rounds": rounds,
        "local_sgd": {"sent_bytes": workers * local_sgd_bytes(model_bytes, workers, 1)},
        "same_blocks": sent(same, rounds),
        "defaults": sent(_layout(workers, None, statistics=True), rounds),
    }


def sent(layout: BlockLayout, rounds: int) -> dict[str, Any]:
    """Bytes per round, of all workers together and of the worker that sends most in its round."""
    workers = layout.schedule.workers
    # Without momentum to travel, an optimizer has no state that is sent.
    sizes = layout.sizes(OptimizerStates([torch.optim.SGD(layout.module.parameters(), lr=1.0)]))
    total, most = 0, []
    for round in range(rounds):
        plan = plan_sync(layout.schedule.partition(round), layout.schedule.partition(round + 1))
        by_worker = [sum(own.values()) for own in sync_bytes(plan, sizes, workers)]
        total += sum(by_worker)
        most.append(max(by_worker))
    return {
        "held": [len(mine) for mine in layout.schedule.partition(0).held],
        "sent_bytes": total / rounds,
        "most_by_a_worker_bytes": mean(most),
    }


def all_volumes(rounds: int) -> dict[str, Any]:
    """Both accountings for 2, 4 and 8 workers."""
    return {
        "table_1": [table_1(workers) for workers in WORKERS],
        "peer_to_peer": [peer_to_peer(workers, rounds) for workers in WORKERS],
    }


def _layout(workers: int, least: int | None, *, statistics: bool) -> BlockLayout:
    module = on_meta(partial(paper_network, 101, statistics=statistics))
    return BlockLayout(module, Config(min_blocks=least), workers)

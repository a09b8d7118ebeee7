"""A worker that is killed while the others start."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from resist_lightning import WorkerLost
from resist_lightning.strategies import process_group
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.process_group import ProcessGroup
from tests.helpers.processes import run_workers_to_the_end
from tests.helpers.trainers import agree_on_a_port

TIMEOUT_SECONDS = 60


def start(worker: int) -> None:
    """Start; worker 1 is killed before it joins the group."""
    port = agree_on_a_port(worker)
    dist.destroy_process_group()
    os.environ.update(
        RANK=str(worker), WORLD_SIZE="3", LOCAL_RANK=str(worker), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )

    def be_killed(*_: Any, **__: Any) -> None:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)

    if worker == 1:
        process_group.join_group = be_killed
    group = ProcessGroup(StrategyOptions(timeout=timedelta(seconds=TIMEOUT_SECONDS)))
    group.join(TorchElasticEnvironment(), "gloo", torch.device("cpu"))


def test_a_worker_that_is_killed_before_the_group_is_made_is_named_by_the_others_at_once() -> None:
    began = time.monotonic()
    outcomes = run_workers_to_the_end(start, 3, timeout=TIMEOUT_SECONDS)
    for worker in (0, 2):
        error = outcomes[worker].error
        assert isinstance(error, WorkerLost), outcomes[worker]
        assert re.match(r"worker 1 \(host .+, pid \d+\) has ended while the workers were starting", str(error))
        assert outcomes[worker].raised_at - began < TIMEOUT_SECONDS / 2
    assert outcomes[1].end == "SIGKILL"

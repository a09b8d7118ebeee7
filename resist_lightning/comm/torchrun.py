"""Reads the environment variables that torchrun gives its workers. Standard library only."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

REMEDY = (
    "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun "
    "(docs/decisions/0010-going-on-without-a-worker.md)"
)


def started_by_torchrun() -> bool:
    """Whether this process is a worker of torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_processes(variables: Mapping[str, str], devices: int, nodes: int) -> None:
    """Check that torchrun has started as many processes on this host as the Trainer expects of each.

    Lightning compares the sum over all hosts only, and takes 3 + 1 processes for 2 + 2.

    Args:
        variables: the environment of this process.
        devices: of ``Trainer(devices=...)``, for each host.
        nodes: of ``Trainer(num_nodes=...)``.

    Raises:
        ValueError: if this host has another number of processes than ``devices``.
    """
    here = int(variables.get("LOCAL_WORLD_SIZE", devices))
    agents = int(variables.get("GROUP_WORLD_SIZE", nodes))
    # Lightning has one way to say that hosts have different numbers: one node with all of the processes.
    if here == devices or (nodes == 1 and agents > 1):
        return
    raise ValueError(
        f"torchrun has started {here} process(es) on this host (--nproc-per-node), but Trainer(devices={devices}, "
        f"num_nodes={nodes}) expects {devices} on each. Start the same number on every host; on CPUs the numbers may "
        f"differ if the Trainer counts all processes as one node: Trainer(devices={devices * nodes}, num_nodes=1)."
    )


def shares_store() -> bool:
    """Whether all attempts of a run use one store, in which the next finds the addresses of the one before."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> str:
    """A name of this attempt of a run, the same on all workers, where the store does not end with the attempt.

    Raises:
        RuntimeError: after a restart by several agents, where there is no such name: each counts restarts for itself.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not shares_store():
        return "0"
    if count != "0" and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "torchrun has restarted this worker, but its store still has the addresses of the previous attempt, so the "
            f"workers of {os.environ['GROUP_WORLD_SIZE']} agents cannot connect: {REMEDY}."
        )
    return count


def agent(fit: int) -> int:
    """A number that identifies this process's agent and a ``fit`` of its script; 0 without an agent.

    Args:
        fit: its number among those with the same snapshots, from 1: a script that is started again comes to the same.
    """
    if not started_by_torchrun():
        return 0
    parent, began = os.getppid(), ""
    with suppress(OSError):
        # The agent's start time, as process numbers are reused.
        stat = Path(f"/proc/{parent}/stat").read_text()
        began = stat.rpartition(")")[2].split()[19]
    name = f"{socket.gethostname()}/{parent}/{began}/{fit}"
    digest = hashlib.sha256(name.encode()).digest()
    # 48 bits: it is sent as a float64.
    return int.from_bytes(digest[:6], "big")

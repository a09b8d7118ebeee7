"""Network namespaces for tests over shaped links; their availability is checked once."""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from experiments.harness.links.namespaces import ADDRESS, Namespaces, why_no_namespaces
from tests.helpers.processes import run_workers
from tests.helpers.programs import as_a_main_process, be_worker

_NEW_HOST_NAME, _NEW_NETWORK, _NEW_MOUNTS = 0x04000000, 0x40000000, 0x00020000  # CLONE_NEWUTS, _NEWNET, _NEWNS
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000  # MS_BIND, MS_REC, MS_PRIVATE

MISSING = why_no_namespaces()
needs_namespaces = pytest.mark.skipif(bool(MISSING), reason=f"no network namespaces: {MISSING}")


def enter_host(network: Namespaces, number: int) -> None:
    """Move this process to a host named ``host-NUMBER``, in a namespace of the network.

    Call it before there are other threads: it would not move them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{network.namespace(number)}", "rb") as namespace:
        entered = libc.setns(namespace.fileno(), _NEW_NETWORK)
    if entered or libc.unshare(_NEW_HOST_NAME):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(f"host-{number}")


def run_on_hosts(
    network: Namespaces,
    processes: Sequence[int],
    target: Callable[..., Any],
    *args: Any,
    addresses: Sequence[str] = (),
    timeout: float = 100,
) -> list[Any]:
    """Call ``target(*args)`` under torchrun, one agent on each host of the network; returns the values by rank.

    As ``torchrun --nnodes=HOSTS --nproc-per-node=... --rdzv-backend=c10d --rdzv-endpoint=ADDRESS --local-addr=...``,
    without an interpreter for each process. As on Debian, a host's own name resolves to 127.0.1.1.

    Args:
        network: one namespace for each host.
        processes: number on each host.
        target: called in each process.
        args: its arguments.
        addresses: of the hosts, if not the network's.
        timeout: seconds after which all are killed.
    """
    own = addresses or [ADDRESS.format(host + 1) for host in range(len(processes))]
    found = run_workers(_be_agent, len(processes), network, processes, own, target, args, timeout=timeout)
    by_rank: dict[int, Any] = {}
    for of_host in found:
        by_rank.update(of_host)
    return [by_rank[rank] for rank in sorted(by_rank)]


def _be_agent(
    host: int,
    network: Namespaces,
    processes: Sequence[int],
    addresses: Sequence[str],
    target: Callable[..., Any],
    args: Any,
) -> dict[int, Any]:
    as_a_main_process()
    enter_host(network, host)
    _resolve_own_name(host)
    config = LaunchConfig(
        min_nodes=len(processes),
        max_nodes=len(processes),
        nproc_per_node=processes[host],
        start_method="fork",
        run_id="hosts",
        rdzv_backend="c10d",
        rdzv_endpoint=f"[{addresses[0]}]:{network.port}",
        rdzv_configs={"is_host": host == 0},
        local_addr=addresses[host],
    )
    found: dict[int, Any] = elastic_launch(config, be_worker)(target, args)
    return found


def _resolve_own_name(host: int) -> None:
    """Give this process and its children an /etc/hosts like Debian's."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f"127.0.0.1 localhost\n127.0.1.1 host-{host}\n")
        file.flush()
        failed = (
            libc.unshare(_NEW_MOUNTS)
            or libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
            or libc.mount(file.name.encode(), b"/etc/hosts", None, _BIND, None)
        )
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

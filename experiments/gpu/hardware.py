"""Looks at the GPU, and probes whether NCCL ranks can share it. For processes of their own: they use the GPU."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from experiments.gpu.cases import Probe
from experiments.gpu.limits import Skipped
from experiments.harness.workers import forked

ENTRIES = 1 << 20
PATIENCE = timedelta(seconds=15)

# Ranks of a communicator must differ by host or by GPU. With a host of its own each, as NCCL sees it, they talk over
# sockets, and over the loopback, as the machine may have no other network.
SHARED_GPU = {
    "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}  # fmt: skip


def nccl_variables(rank: int, classic: bool) -> dict[str, str]:
    """The environment of a rank that shares its GPU with others."""
    chosen = {"TORCH_DIST_USE_NCCL2": "0"} if classic else {}
    return {**SHARED_GPU, "NCCL_HOSTID": f"rank-{rank}", **chosen}


def has_two_backends() -> bool:
    """Whether this torch has a new NCCL backend beside the classic one."""
    return hasattr(dist, "ProcessGroupNCCL2") or hasattr(dist.distributed_c10d, "ProcessGroupNCCL2")


def look(_: Any) -> dict[str, Any]:
    """The GPU, if there is one that computes, and the versions that matter to it."""
    versions = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    if not torch.cuda.is_available():
        return {"device": "cpu", "gpu": None, **versions}
    torch.ones(1, device="cuda").sum().item()
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "gpu": properties.name,
        "gpu_memory": f"{properties.total_memory / 1e9:.0f} GB",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _driver(),
        **versions,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def probe(case: Probe, device: str) -> dict[str, Any]:
    """Run all of the package's process-group operations once, on one GPU."""
    if device != "cuda":
        raise Skipped("no GPU")
    if case.classic and not has_two_backends():
        raise Skipped("this torch has one NCCL backend")
    found = forked(_talk, case, case.ranks, grouped=False, variables=lambda rank: nccl_variables(rank, case.classic))
    return {"class": found[0]["class"], "all_reduce_seconds": max(rank["all_reduce_seconds"] for rank in found)}


def _talk(rank: int, case: Probe) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method="env://", rank=rank, world_size=case.ranks, timeout=PATIENCE, device_id=device
    )
    numbers = torch.full((ENTRIES,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    _expect(numbers, sum(range(1, case.ranks + 1)))
    seconds = _timed_all_reduce(numbers)
    _gather(rank, case.ranks, device)
    _exchange(rank, case.ranks, device)
    backend = type(dist.distributed_c10d._get_default_group()._get_backend(device)).__name__
    dist.destroy_process_group()
    return {"class": backend, "all_reduce_seconds": seconds}


def _timed_all_reduce(numbers: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    dist.all_reduce(numbers)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def _gather(rank: int, ranks: int, device: torch.device) -> None:
    rows = [torch.empty(8, device=device) for _ in range(ranks)]
    dist.all_gather(rows, torch.full((8,), float(rank), device=device))
    for source, row in enumerate(rows):
        _expect(row, source)


def _exchange(rank: int, ranks: int, device: torch.device) -> None:
    """Exchange as in a hand-over: to the next rank, from the one before, receives first."""
    landing = torch.empty(ENTRIES, device=device)
    receive = dist.P2POp(dist.irecv, landing, (rank - 1) % ranks)
    send = dist.P2POp(dist.isend, torch.full((ENTRIES,), float(rank), device=device), (rank + 1) % ranks)
    for work in dist.batch_isend_irecv([receive, send]):
        work.wait()
    _expect(landing, (rank - 1) % ranks)


def _expect(numbers: torch.Tensor, value: float) -> None:
    if not bool((numbers == value).all()):
        raise RuntimeError(f"rank {os.environ['RANK']} has {numbers[:4].tolist()} where {value} was sent")

"""The backends of a process group, gloo and NCCL: which one serves a worker's tensors, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

NCCL = ("nccl", "nccl2", "nccl-legacy", "nccl-lazy")
"""The names of NCCL's backends: torch 2.15 has a new one beside the classic one, and uses it for ``"nccl"``."""

_NCCL_VARIABLES = {
    # An operation that fails ends with an error; by default NCCL's watchdog would end the process by SIGABRT.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    # After a failure that watchdog would wait a minute for reports of all workers, and leave a mark in the store that
    # would end a restarted training.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000",
}


def uses_nccl(backend: str) -> bool:
    """Whether a backend is NCCL, or has NCCL for some type of device, as ``"cpu:gloo,cuda:nccl"`` has."""
    names = [part.rpartition(":")[2] for part in backend.lower().split(",")]
    return any(name in NCCL for name in names)


def nccl_variables(given: Mapping[str, str], *, by_torchrun: bool) -> dict[str, str]:
    """The environment variables that a group of NCCL needs and the user has not set.

    Args:
        given: the environment of this process.
        by_torchrun: whether torchrun has started it.
    """
    missing = {name: value for name, value in _NCCL_VARIABLES.items() if name not in given}
    handling = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if by_torchrun and given.get(handling) == "1":  # torchrun's own, where the user has set none
        missing[handling] = _NCCL_VARIABLES[handling]
    return missing


def check_backend(
    backend: str | None, device: torch.device, backends: Mapping[str, str], rank: int, bound: torch.device | None
) -> None:
    """Raise where the default group cannot serve the tensors of this worker.

    Args:
        backend: the group's for this device, if it has one.
        device: of the module.
        backends: the group's, by type of device.
        rank: of this process.
        bound: the device to which the group is bound, if it is.
    """
    config = ",".join(f"{kind}:{name}" for kind, name in backends.items())
    if backend is None or (backend == "gloo" and backends.get("cpu") != "gloo"):
        raise ValueError(
            f"the module is on {device}, and torch.distributed's default group has {config!r} only. Move the module "
            "to its GPU before the Engine is made, or call init_process_group('cpu:gloo,cuda:nccl')."
        )
    if backend not in ("gloo", *NCCL):
        raise ValueError(
            f"torch.distributed's default group sends tensors on {device} by {backend!r}, and only 'gloo' and 'nccl' "
            "are supported. Call init_process_group('gloo'), or 'nccl' for GPUs."
        )
    if device.type == "cuda" and device.index is not None:
        _check_bound(backend, device, rank, bound)


def _check_bound(backend: str, device: torch.device, rank: int, bound: torch.device | None) -> None:
    """Raise where NCCL, or torch beside the group, would use another GPU than the module's."""
    if bound is None:
        bound = torch.device("cuda", torch.cuda.current_device())
        wrong = f"the current device of its process is {bound}"
    else:
        wrong = f"its process group is bound to {bound}"
    if bound.index != device.index:
        calls = f"torch.cuda.set_device({device.index})"
        if backend in NCCL:
            calls += f" and init_process_group('nccl', device_id=torch.device('{device}'))"
        raise ValueError(
            f"the module of rank {rank} is on {device}, and {wrong}. Call {calls} before the module is moved."
        )


def binds(backend: str, device: torch.device) -> bool:
    """Whether a group of this backend is bound to the worker's device when it is made.

    A bound group makes its subgroups by splitting, which gloo does not support: processes outside of a subgroup would
    end with an AttributeError.
    """
    return backend in NCCL and device.type == "cuda"

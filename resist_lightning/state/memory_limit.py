"""Finds the memory limit of this process, and whether weights, gradients and optimizer state fit in it."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from resist_lightning.state.optimizer_state import OptimizerStates

_UNLIMITED = 1 << 60  # control groups of version 1 report a number near 2**63


class Limit(NamedTuple):
    """A limit on the memory of a process, or of several together."""

    bytes: int
    source: str


class Needed(NamedTuple):
    """Bytes that a worker needs in every step, beside activations; a lower bound."""

    weights: int
    gradients: int
    state: int


def shortage(needed: Needed, limit: Limit, remedy: str) -> str:
    """Error text for a worker that cannot train within a limit; empty if it may."""
    missing = sum(needed) - limit.bytes
    if missing <= 0:
        return ""
    parts = f"weights {_megabytes(needed.weights)}, gradients {_megabytes(needed.gradients)}, optimizer state "
    return (
        f"this worker cannot train: without activations it needs at least {_megabytes(sum(needed))} "
        f"({parts}{_megabytes(needed.state)}), but its limit is {_megabytes(limit.bytes)} ({limit.source}), "
        f"{_megabytes(missing)} too little. {remedy}"
    )


def needed_to_train(module: nn.Module, states: OptimizerStates, *, gradients: bool) -> Needed:
    """Memory that the present parameters of a module need in a step.

    Args:
        module: the user's; absent parameters are on the meta device.
        states: state of its optimizers.
        gradients: whether all gradients are there at the same time, as where Lightning calls the optimizer.
    """
    present = [parameter for parameter in module.parameters() if not parameter.is_meta]
    trained = [parameter for parameter in present if parameter.requires_grad]
    return Needed(
        weights=sum(parameter.nbytes for parameter in present),
        gradients=sum(parameter.nbytes for parameter in trained) if gradients else 0,
        state=states.bytes(trained),
    )


def memory_limit(device: torch.device) -> Limit | None:
    """The least of the known limits of memory on a device; None if there is none."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Limit(int(properties.total_memory), f"all of {properties.name}")
    return min([*_of_groups(), *_of_resources()], default=None)


def _of_resources() -> Iterable[Limit]:
    for number, name in ((resource.RLIMIT_DATA, "RLIMIT_DATA"), (resource.RLIMIT_AS, "RLIMIT_AS")):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            yield Limit(soft, f"{name}, `ulimit`")


def _of_groups(mine: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Sequence[Limit]:
    """Limits of this process's control group and of those around it, of version 1 or 2."""
    found: list[Limit] = []
    lines = _text(mine).splitlines()
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        if not version_1 and number != "0":
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if version_1 else (root, "memory.max")
        group = base / path.lstrip("/")
        # In a container the path may be that of the host; the limit then stands at the root.
        for folder in (group, *group.parents):
            text = _text(folder / name).strip()
            if text.isdecimal() and int(text) < _UNLIMITED:
                found.append(Limit(int(text), f"the control group's {folder / name}"))
            if folder == base:
                break
    return found


def _text(path: Path) -> str:
    """The content of a kernel file; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

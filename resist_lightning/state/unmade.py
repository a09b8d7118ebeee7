"""Modules whose parameters have a shape and no memory: built so by workers that will be sent their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.state.memory import replace_memory
from resist_lightning.state.random_state import random_numbers_apart


def is_unmade(module: nn.Module) -> bool:
    """Whether some of a module's tensors have no memory."""
    return any(tensor.is_meta for tensor in named_tensors(module).values())


def present_device(module: nn.Module, device: torch.device | None = None) -> torch.device:
    """The device of a module's first parameter that has memory, or else ``device``, by default the CPU."""
    devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(devices, device or torch.device("cpu"))


def allocate(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Allocate the tensors that have no memory, for the caller to fill; their Python objects stay."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            replace_memory(name, tensor, empty)


def initialise(module: nn.Module, device: torch.device) -> None:
    """Make a module that has no memory, as Lightning's FSDP does: by ``reset_parameters`` of each part, in order.

    The global generators stay where they are: the other workers, which get the values, draw nothing.

    Raises:
        ValueError: if a part with tensors has no such method, as only its ``__init__`` knows their values.
    """
    with random_numbers_apart():
        _initialise(module, device)


def _initialise(module: nn.Module, device: torch.device) -> None:
    for name, child in module.named_modules():
        own = {**dict(child.named_parameters(recurse=False)), **dict(child.named_buffers(recurse=False))}
        if not any(tensor.is_meta for tensor in own.values()):
            continue
        reset = getattr(child, "reset_parameters", getattr(child, "_reset_parameters", None))
        if not callable(reset):
            raise ValueError(
                f"{name or 'the module'} ({type(child).__name__}) was built on the meta device, and has no "
                "`reset_parameters`, so its values are unknown. Add this method, or build the network in "
                "`configure_model` without torch.device('meta'): there only worker 0 makes all values."
            )
        allocate({f"{name}.{key}".lstrip("."): tensor for key, tensor in own.items()}, device)
        reset()


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any], device: torch.device) -> None:
    """Load the state dict of an optimizer whose parameters may have no memory: their state has memory all the same.

    ``Optimizer.load_state_dict`` would cast it to the device of its parameter, where it would lose its values.
    """
    optimizer.load_state_dict({**state, "state": {}})
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        # Steps are counted on the CPU, except where the step is one kernel or part of a graph; in a type of their own.
        counts_on_device = group.get("fused") or group.get("capturable")
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            dtype = parameter.dtype if parameter.is_floating_point() else None
            for key, value in state["state"].get(number, {}).items():
                moved = value
                if isinstance(value, Tensor) and key != "step":
                    moved = value.to(device, dtype, copy=True)
                elif isinstance(value, Tensor) and counts_on_device:
                    moved = value.to(device, copy=True)
                optimizer.state[parameter][key] = moved


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, parameters lose their memory when a module registers them; buffers and plain tensors keep it.

    Each has its memory for a moment, so the peak is one parameter. Few random numbers are drawn.
    """
    usual = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        usual(self, name, parameter)
        if parameter is not None and not parameter.is_meta and not is_lazy(parameter):
            empty = torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta")
            with suppress(RuntimeError):  # something uses it: then it stays, until the training starts
                replace_memory(name, parameter, empty)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]

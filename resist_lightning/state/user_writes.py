"""Finds which tensors of the user's own are written while the module is the full model: those stay written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from resist_lightning.comm.tensors import same


@dataclass(frozen=True)
class _Before:
    tensor: Tensor
    version: int
    value: Tensor | None


class Writes:
    """Watches buffers, and parameters that are frozen, from now on.

    Args:
        module: the user's module.
        ours: names of tensors that are not watched: what the full model has of its own.
    """

    def __init__(self, module: nn.Module, ours: Collection[str]) -> None:
        self._module = module
        self._before: dict[str, _Before] = {}
        for name, buffer in module.named_buffers():
            if name not in ours:  # code that writes to `.data` moves no version, so the value is compared too
                self._before[name] = _Before(buffer, version(buffer), buffer.detach().clone())
        for name, parameter in module.named_parameters():
            if name not in ours and not parameter.requires_grad:
                self._before[name] = _Before(parameter, version(parameter), None)

    def found(self) -> dict[str, Tensor]:
        """By name, the tensors that have been written, or put in the place of others."""
        named: dict[str, Tensor] = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        return {
            name: named[name]
            for name, before in self._before.items()
            if name in named and _differs(named[name], before)
        }


def version(tensor: Tensor) -> int:
    """A number that moves whenever a tensor is written in place; tensors made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


def _differs(tensor: Tensor, before: _Before) -> bool:
    if tensor is not before.tensor or version(tensor) != before.version:
        return True
    return before.value is not None and not same(tensor, before.value)

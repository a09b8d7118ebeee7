"""Names in a saved state, where blocks are in torch's ``checkpoint_wrapper`` in one run, and not in the next.

The wrapper is a part of the names of what it contains::

    layers.3.weight                               in a run that keeps the activations of this layer
    layers.3._checkpoint_wrapped_module.weight    in one that computes them a second time
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_WRAPPED = "_checkpoint_wrapped_module"


def as_named_in(module: nn.Module, state: Any) -> Any:
    """A saved state with the names of tensors and modules in it as ``module`` has them.

    Args:
        module: whose blocks may be wrapped, or not.
        state: dicts, lists and tuples of names, tensors and anything else, which stays as it is.
    """
    if isinstance(state, str):
        return _name_in(module, state)
    if isinstance(state, Mapping):
        return {as_named_in(module, key): as_named_in(module, value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)([as_named_in(module, value) for value in state])
    return state


def _name_in(module: nn.Module, name: str) -> str:
    parts = []
    owner: nn.Module | None = module
    for part in name.split("."):
        if part == _WRAPPED:
            continue
        while owner is not None and _WRAPPED in owner._modules:
            parts.append(_WRAPPED)
            owner = owner._modules[_WRAPPED]
        parts.append(part)
        owner = owner._modules.get(part) if owner is not None else None
    return ".".join(parts)

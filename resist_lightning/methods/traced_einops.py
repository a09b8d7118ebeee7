"""Lets torch.fx trace calls of einops, whose functions ask for the type of a tensor: each call becomes one node."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

_NAMES = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack")


def einops_functions() -> dict[str, Callable[..., Any]]:
    """The functions of einops by name; none where it was not imported."""
    module = sys.modules.get("einops")
    return {name: getattr(module, name) for name in _NAMES if hasattr(module, name)}


@contextmanager
def einops_as_nodes() -> Iterator[None]:
    """Inside, calls by the package's name (``einops.rearrange``) are traced.

    Those by a name of the user's (``from einops import rearrange``) are for a tracer's ``autowrap_functions``.
    """
    functions = einops_functions()
    for name, function in functions.items():
        setattr(sys.modules["einops"], name, _as_node(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(sys.modules["einops"], name, function)


def _as_node(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [value for value in tree_leaves([args, kwargs]) if isinstance(value, fx.Proxy)]
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call

"""Finds references to a tensor, for the error that a block cannot be handed over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdRef

_MOST_NODES = 10_000  # visited in an autograd graph
_DEPTH = 3  # of containers in containers
_MOST_NAMED = 3
_FORGETS = "invalidate_compile_context_weakrefs"  # torch 2.10 has no such setting


def who_holds(tensor: Tensor) -> str:
    """A sentence that names the users of a tensor's memory, with the remedy."""
    weak = weakref.getweakrefs(tensor)
    if any(isinstance(reference, WeakIdRef) for reference in weak):
        return f"torch.compile keeps a weak reference to it. {_remedy_for_compiled()}"
    if weak:
        return (
            f"{_places(weak) or 'something'} has a weak reference to it, which would point to freed memory. Drop the "
            "reference before the round ends, or leave its block out of `blocks`."
        )
    views, graphs = _users(tensor)
    if views:
        places = _places(views)
        where = f" in {places}" if places else ""
        return f"a view of it, which keeps its memory, is still in use{where}. Keep a copy instead: .clone()."
    places = _places(graphs)
    where = f" that a tensor in {places} keeps" if places else ""
    return (
        f"something else still uses it, most often an autograd graph{where}: detach losses and outputs before you "
        "keep them, or call backward on them before the round ends."
    )


def _users(tensor: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors of the process that are views of a tensor, and those whose autograd graph ends in it."""
    views, graphs = [], []
    for other in gc.get_objects():
        # Not isinstance, which asks third-party proxies for their class and runs their code.
        if not issubclass(type(other), Tensor) or other is tensor:
            continue
        if other._base is tensor:
            views.append(other)
        elif other._base is None and other.grad_fn is not None and _leads_to(other.grad_fn, tensor):
            graphs.append(other)
    return views, graphs


def _leads_to(node: Any, tensor: Tensor) -> bool:
    """Whether an autograd graph has ``tensor`` as a leaf."""
    pending: list[Any] = [node]
    seen: set[Any] = set()
    while pending and len(seen) < _MOST_NODES:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is tensor:
            return True
        pending += [following for following, _ in node.next_functions]
    return False


def _places(objects: list[Any]) -> str:
    """The attributes and variables that refer to some objects, also through containers, in words."""
    found: list[str] = []
    reached, level = {id(held) for held in objects}, objects
    for _ in range(_DEPTH):
        containers: list[Any] = []
        for holder in gc.get_referrers(*level):
            if isinstance(holder, FrameType):
                if not str(holder.f_globals.get("__name__")).startswith("resist_lightning."):  # not our own search
                    names = _names(holder.f_locals, reached)
                    found += [f"variable {name!r} of {holder.f_code.co_name}()" for name in names]
            elif not isinstance(holder, dict | list | tuple | set):
                names = _names(getattr(holder, "__dict__", {}), reached)
                found += [f"attribute {name!r} of a {type(holder).__name__}" for name in names]
            elif holder is not level:
                containers.append(holder)
        reached |= {id(container) for container in containers}
        level = containers
    return ", ".join(list(dict.fromkeys(found))[:_MOST_NAMED])


def _names(attributes: Mapping[str, object], reached: set[int]) -> list[str]:
    return [name for name, value in list(attributes.items()) if id(value) in reached]


def _remedy_for_compiled() -> str:
    import torch._dynamo  # a heavy module, which is loaded already if anything was compiled

    if hasattr(torch._dynamo.config, _FORGETS):
        return (
            f"It does so for a backend of your own: set torch._dynamo.config.{_FORGETS} = True, or register the "
            "backend by name (torch._dynamo.register_backend)."
        )
    return (
        f"torch {torch.__version__} does so for every backend, and torch 2.15 does not: use torch 2.15, or do not "
        "compile partitioned blocks."
    )

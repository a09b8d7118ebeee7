"""The computation of a user's module as a graph, without running it on an example."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from resist_lightning.errors import LayerSelectionError
from resist_lightning.randomness import random_state, set_random_state

Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")  # with the separator: not torchvision
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+(?:\n\s*(?!File ")(\S.*))?')


@dataclass(frozen=True)
class Traced:
    """A module of the user's that has a forward of its own, as a graph.

    Args:
        module: the module.
        graph: its forward, from whole inputs to whole outputs; modules of torch.nn are single nodes.
        prefix: what its names begin with in the user's module, with the dot at the end.
        attributes: what its forward reads itself: parameters, buffers, constants, by name.
        stored: values that its forward leaves in attributes of modules.
        defaults: optional arguments of its forward, with the values that they had.
    """

    module: nn.Module
    graph: fx.Graph
    prefix: str
    attributes: dict[str, Any]
    stored: tuple[fx.Node, ...]
    defaults: dict[str, Any]

    def called(self, node: fx.Node) -> tuple[str, nn.Module]:
        """Qualified name in the user's module, and module, of a ``call_module`` node."""
        return f"{self.prefix}{node.target}", self.module.get_submodule(str(node.target))


def trace(module: nn.Module, wanted: Callable[[str, nn.Module], bool] = lambda *_: True) -> list[Traced]:
    """Trace a module as it computes in training.

    A module without a forward of its own (a LightningModule that has only steps, a ModuleDict) is traced child by
    child; children without a Linear or Conv (losses, metrics), or without anything that trains, are left out.

    Args:
        module: the user's module.
        wanted: asked for the name and module of each Linear and Conv; a child that cannot be traced, with none that
            is wanted, is left out.

    Raises:
        LayerSelectionError: if torch.fx cannot trace it.
    """
    random = random_state()
    try:
        with _in_training(module):
            found = [_trace_if_wanted(root, prefix, wanted) for prefix, root in _roots(module, "")]
    finally:
        set_random_state(random)
    return [traced for traced in found if traced is not None]


def _trace_if_wanted(root: nn.Module, prefix: str, wanted: Callable[[str, nn.Module], bool]) -> Traced | None:
    try:
        return _trace(root, prefix)
    except LayerSelectionError:
        if _any_wanted(root, prefix, wanted):
            raise
        return None


def _any_wanted(root: nn.Module, prefix: str, wanted: Callable[[str, nn.Module], bool]) -> bool:
    weighted = [(f"{prefix}{name}", child) for name, child in root.named_modules() if isinstance(child, Weighted)]
    return any(wanted(name.rstrip("."), child) for name, child in weighted)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is not looked into: it computes what its class in torch.nn does, or is compiled TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if "forward" in vars(module):  # the user's own, which takes the place of the class's
        return False
    forward_from = getattr(inspect.unwrap(type(module).forward), "__module__", "")
    return forward_from.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential)


def user_line(node: fx.Node) -> str:
    """Where the user's code makes a node, as `` (net.py:12: h = h.softmax(1))``; empty if it is not known."""
    frames = _FRAME.findall(node.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    if not own:
        return ""
    path, line, code = own[-1]
    return f" ({path}:{line}: {code})" if code else f" ({path}:{line})"


class _Tracer(fx.Tracer):
    record_stack_traces = True
    proxy_buffer_attributes = True

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def _roots(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if _has_forward(module):
        if not is_leaf(module) and _has_weights(module) and _trains(module):
            yield prefix, module
        return
    for name, child in module.named_children():
        yield from _roots(child, f"{prefix}{name}.")


def _has_forward(module: nn.Module) -> bool:
    """A LightningModule inherits a forward that only raises; Lightning is not imported to find out."""
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    lightning = owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
    return owner is not nn.Module and not (lightning and owner.__name__ == "LightningModule")


def _has_weights(module: nn.Module) -> bool:
    return any(isinstance(child, Weighted) for child in module.modules())


def _trains(module: nn.Module) -> bool:
    """A frozen network (a teacher, a perceptual loss) stays whole: a subnet of it computes something else."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _trace(root: nn.Module, prefix: str) -> Traced:
    tracer, defaults = _Tracer(), _defaults(root)
    try:
        graph = tracer.trace(root, concrete_args=defaults or None)
    except Exception as error:
        innermost = list(tracer.module_stack.values())[-1:] or [("", type(root))]
        where, kind = f"{prefix}{innermost[0][0]}".rstrip("."), innermost[0][1].__name__
        name = f"{where!r} ({kind})" if where else f"the module itself ({kind})"
        raise LayerSelectionError(
            f"the forward of {name} cannot be traced, so its hidden neurons cannot be found. torch.fx says"
            f"{_raised_at(error)}: {type(error).__name__}: {error}. The way out: put the layers whose neurons are to "
            "be dealt out into a module whose forward has no branch or loop that depends on a value or a shape, and "
            "call what remains around it from the steps of a LightningModule without a forward of its own."
        ) from error
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    attributes = {name: attrgetter(name)(root) for name in read}
    left = tree_leaves([list(vars(child).values()) for child in root.modules()])
    stored = tuple(value.node for value in left if isinstance(value, fx.Proxy) and value.node.graph is graph)
    return Traced(root, graph, prefix, attributes, stored, defaults)


def _defaults(root: nn.Module) -> dict[str, Any]:
    """Optional arguments keep their defaults, so that ``if mask is not None`` is decided."""
    plain = bool | int | float | str | None
    parameters = inspect.signature(type(root).forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, plain)}


def _raised_at(error: Exception) -> str:
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]
    own = [frame for frame in own if frame.filename != __file__]
    return f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


@contextmanager
def _in_training(module: nn.Module) -> Iterator[None]:
    """Only training happens in subnets. What the tracer, or a forward that it runs, sets on a module is undone."""
    modules = [child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule)]
    before = [dict(vars(child)) for child in modules]
    if not module.training:
        for child in modules:
            child.training = True
    try:
        yield
    finally:
        for child, attributes in zip(modules, before, strict=True):
            vars(child).clear()
            vars(child).update(attributes)


def names_of_tensors(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its id."""
    names: dict[int, list[str]] = {}
    everything: list[tuple[str, Tensor]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in everything:
        names.setdefault(id(tensor), []).append(name)
    return names

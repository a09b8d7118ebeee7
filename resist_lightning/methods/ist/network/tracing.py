"""Traces the networks inside a user's module into graphs, without running them on an example."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

from torch import fx, nn

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.tracing import (
    CannotTrace,
    Tracer,
    defaults,
    follow,
    has_forward,
    in_training,
    is_leaf,
    left_behind,
    trains,
)
from resist_lightning.state.random_state import random_numbers_apart

Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Traced:
    """A traced part of the user's module that has a forward of its own.

    Args:
        module: the module.
        graph: its forward, from whole inputs to whole outputs; modules of torch.nn are single nodes.
        prefix: prefix of its names in the user's module, with the dot at the end.
        attributes: parameters, buffers and constants that its forward reads itself, by name.
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


def trace(
    module: nn.Module,
    wanted: Callable[[str, nn.Module], bool] = lambda *_: True,
    trained: Collection[int] | None = None,
) -> list[Traced]:
    """Trace a module as it computes in training.

    A module without a forward of its own (a LightningModule that has only steps, a ModuleDict) is traced child by
    child; children without a Linear or Conv (losses, metrics), or without anything that trains, are left out.

    Args:
        module: the user's module.
        wanted: predicate of the name and module of each Linear and Conv; a child that cannot be traced, and has none
            that is wanted, is left out.
        trained: ids of the parameters that optimizers have; None if they are not known yet.

    Raises:
        LayerSelectionError: if torch.fx cannot trace it.
    """
    found = []
    with random_numbers_apart(), in_training(module):  # a forward that is traced may draw random numbers
        for prefix, root in _roots(module, "", trained):
            try:
                found.append(_trace(root, prefix))
            except LayerSelectionError:
                # A child without a wanted layer may compute as it likes.
                if _any_wanted(root, prefix, wanted):
                    raise
    return found


def _any_wanted(root: nn.Module, prefix: str, wanted: Callable[[str, nn.Module], bool]) -> bool:
    for name, child in root.named_modules():
        if isinstance(child, Weighted) and wanted(f"{prefix}{name}".rstrip("."), child):
            return True
    return False


def _roots(module: nn.Module, prefix: str, trained: Collection[int] | None) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with a forward of their own, as far as they have layers that train."""
    # Modules inside a module with a forward are traced with it.
    if has_forward(module):
        # A network that does not train (a teacher, a perceptual loss) stays whole: a subnet of it computes another.
        if not is_leaf(module) and _has_weights(module) and trains(module.parameters(), trained):
            yield prefix, module
        return
    for name, child in module.named_children():
        yield from _roots(child, f"{prefix}{name}.", trained)


def _has_weights(module: nn.Module) -> bool:
    return any(isinstance(child, Weighted) for child in module.modules())


def _trace(root: nn.Module, prefix: str) -> Traced:
    try:
        graph = follow(Tracer(), root, prefix)
    except CannotTrace as error:
        raise LayerSelectionError(
            f"the forward of {error.where} cannot be traced, so its hidden neurons cannot be found. torch.fx "
            f"says{error.said}. The way out: put the layers whose neurons are to be dealt out into a module whose "
            "forward has no branch or loop that depends on a value or a shape, and call that module from the steps of "
            "a LightningModule without a forward of its own."
        ) from error
    attributes = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            attributes[name] = attrgetter(name)(root)
    return Traced(root, graph, prefix, attributes, left_behind(root, graph), defaults(root))

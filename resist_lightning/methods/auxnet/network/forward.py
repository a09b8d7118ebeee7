"""Traces the forward of a network into a graph, and refuses one that a graph would not repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.find import describe
from resist_lightning.methods.globs import summary
from resist_lightning.methods.residual import find_blocks
from resist_lightning.methods.tracing import (
    RECOMPUTED,
    CannotTrace,
    ChainTracer,
    defaults,
    follow,
    in_training,
    is_leaf,
    left_behind,
    user_line,
)
from resist_lightning.state.random_state import random_numbers_apart, random_state, set_random_state

_COMPILED = "_orig_mod"  # torch.compile keeps the module that it wraps here


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Inside, the module is as in training; effects of tracing on it and on random generators are undone."""
    with random_numbers_apart(), in_training(module), torch.enable_grad():
        yield


def trace_network(module: nn.Module, network: nn.Module, name: str) -> tuple[ChainTracer, fx.Node, fx.Node]:
    """Trace the forward of the network ``name`` of the user's module. To be called inside :func:`unchanged`.

    Returns:
        The tracer, and the nodes of the network's input and output.

    Raises:
        StageSelectionError: if torch.fx cannot trace it, or a graph would compute something else.
    """
    # Compiled in place, or wrapped by `torch.compile`, or the module that it has wrapped.
    wrapped = hasattr(network, _COMPILED) or _COMPILED in name.split(".")
    if wrapped or network._compiled_call_impl is not None:
        raise StageSelectionError(
            f"{describe(name)} is compiled as a whole (torch.compile), and cannot be cut any more. Compile its blocks "
            "instead, each by block.compile()."
        )
    # The tracer follows the class's forward.
    if "forward" in vars(network):
        raise StageSelectionError(
            f"{describe(name)} cannot be cut into stages: its forward was replaced on the object. Put the new forward "
            "into its class."
        )
    random, before = random_state(), _attributes(network)
    tracer = _trace(network, name)
    changed = []
    for path, value in _attributes(network).items():
        if before.get(path, value) != value:
            changed.append(path)
    # A hook may leave a value in any part of the module.
    left = left_behind(module, tracer.graph)
    _refuse_state(tracer, name, left, changed, drew=not _equal(random, random_state()))
    return tracer, _input(network, tracer.graph, name), _output(tracer.graph, name)


def _trace(network: nn.Module, name: str) -> ChainTracer:
    """Trace the network; without residual blocks, submodules that cannot be traced become single nodes."""
    blocks = set(network_blocks(network).values())
    opaque: set[nn.Module] = set()
    while True:
        random = random_state()
        tracer = ChainTracer(_Leaves(blocks, opaque))
        try:
            follow(tracer, network, f"{name}." if name else "")
            return tracer
        except CannotTrace as error:
            path = error.path
            # A leaf fails where it is called with values that torch.fx cannot write down: then its caller is opaque.
            while path and tracer.is_leaf_module(network.get_submodule(path), path):
                path = path.rpartition(".")[0]
            if blocks or not path:
                raise StageSelectionError(
                    f"the forward of {error.where} cannot be traced, so it cannot be cut into stages. torch.fx "
                    f"says{error.said}. The way out: put branches and loops that depend on a value or a shape into "
                    "submodules without residual blocks, or into the blocks: those are not traced. For a model of "
                    "transformers, call its parts one after another in a module of your own (docs/auxnet.md)."
                ) from error
            opaque.add(network.get_submodule(path))
            # The next try must begin with the same random state.
            set_random_state(random)


class _Leaves:
    """Decides for the tracer whether a module is a single node.

    Only modules that contain residual blocks are traced into; without any, all but torch's own.
    """

    def __init__(self, blocks: set[nn.Module], opaque: set[nn.Module]) -> None:
        self._blocks, self._opaque = blocks, opaque

    def __call__(self, module: nn.Module) -> bool:
        if not self._blocks:
            return module in self._opaque or is_leaf(module)
        contains_blocks = any(child in self._blocks for child in module.modules())
        return module in self._blocks or not contains_blocks


def _input(network: nn.Module, graph: fx.Graph, name: str) -> fx.Node:
    """The one input of the network; arguments that may be left out do not count."""
    fixed = defaults(network)
    wanted = []
    for node in graph.nodes:
        if node.op != "placeholder" or _is_fixed(node, fixed):
            continue
        optional = _is_variadic(node) or node.args  # a placeholder's argument is its default
        if node.users or not optional:
            wanted.append(node)
    if len(wanted) != 1 or _is_variadic(wanted[0]):
        names = ", ".join(str(node.target) for node in wanted)
        raise StageSelectionError(
            f"{describe(name)} takes {names or 'nothing'}, but stages pass on a single tensor. Make it a module that "
            "takes one tensor, or name a part of it that does by network=."
        )
    found: fx.Node = wanted[0]
    return found


def _is_variadic(node: fx.Node) -> bool:
    return str(node.target).startswith("*")


def _is_fixed(node: fx.Node, fixed: dict[str, object]) -> bool:
    """Whether torch.fx was given a value for an argument: it numbers these, as ``mask_1``."""
    stem, _, number = str(node.target).rpartition("_")
    return stem in fixed and number.isdecimal()


def _output(graph: fx.Graph, name: str) -> fx.Node:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned = output.args[0]
    what = None
    if returned is None:
        what = "None"
    elif not isinstance(returned, fx.Node):
        # torch.fx has classes of its own for dicts and lists.
        kinds = [kind.__name__ for kind in (dict, list, tuple) if isinstance(returned, kind)]
        what = f"a {kinds[0] if kinds else type(returned).__name__}"
    elif isinstance(returned.target, type):
        what = f"a {returned.target.__name__}"
    elif returned.op in ("placeholder", "get_attr"):
        what = "its input, or a parameter"
    if what is not None:
        raise StageSelectionError(
            f"{describe(name)} returns {what}, but stages pass on a single tensor. Return one tensor from it, or name "
            "a part of it that does by network=."
        )
    assert isinstance(returned, fx.Node)
    return returned


def _refuse_state(
    tracer: ChainTracer, name: str, left: Sequence[fx.Node], changed: Sequence[str], *, drew: bool
) -> None:
    """Refuse a forward with side effects: they would be lost, or frozen as traced."""
    problem = None
    read = [node for node in tracer.graph.nodes if node.op == "get_attr"]
    constants = [node for node in read if str(node.target).startswith("_tensor_const")]
    if left:
        problem = (
            f"leaves a value in an attribute{user_line(left[0])}, or a hook does; return it, or let a block keep it"
        )
    elif constants:
        users = [user for node in constants for user in node.users]
        problem = f"makes a tensor of constants{user_line(users[0]) if users else ''}; register it as a buffer"
    elif tracer.unlike and RECOMPUTED in tracer.unlike[0].meta:
        problem = (
            f"recomputes activations by checkpoint(..., use_reentrant=True){user_line(tracer.unlike[0])}, whose "
            "backward pass is none that a stage can take; use use_reentrant=False"
        )
    elif tracer.unlike:
        where = user_line(tracer.unlike[0])
        problem = (
            f"computes under no_grad, autocast or the like{where}, but stages would not; do that inside a block, or "
            "freeze by requires_grad_(False)"
        )
    elif changed:
        problem = f"changes the attribute {changed[0]!r}, which a traced graph does not; do that inside a block"
    elif drew:
        problem = "draws a random number that tracing would make a constant; do that inside a block"
    if problem is not None:
        raise StageSelectionError(f"{describe(name)} cannot be cut into stages: its forward {problem}.")


def _attributes(network: nn.Module) -> dict[str, object]:
    """The numbers, strings and switches that modules keep as attributes, by name."""
    found: dict[str, object] = {}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def _equal(one: object, other: object) -> bool:
    for mine, theirs in zip(tree_leaves(one), tree_leaves(other), strict=False):
        same = torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
        if not same:
            return False
    return True


def network_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks by name; one that torch.compile has wrapped is taken with its wrapper."""
    names = (block.name.removesuffix(f".{_COMPILED}") for block in find_blocks(network))
    return {name: network.get_submodule(name) for name in names}


def unreached(network: nn.Module, graph: fx.Graph) -> str:
    """The residual blocks that the forward of the network never calls; empty if it calls all."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    missed = []
    for name in network_blocks(network):
        # A block is reached by itself, or within a module that is a single node.
        if not any(f"{name}.".startswith(f"{outer}.") for outer in called):
            missed.append(name)
    return summary(missed)

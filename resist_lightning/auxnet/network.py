"""Which part of a user's module is the network that is cut into stages, and its forward as a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from resist_lightning.auxnet.graph import ChainTracer
from resist_lightning.blocks import find_blocks, summary
from resist_lightning.errors import StageSelectionError
from resist_lightning.randomness import random_state, set_random_state
from resist_lightning.tracing import (
    CannotTrace,
    defaults,
    follow,
    has_forward,
    in_training,
    is_leaf,
    left_behind,
    user_line,
)


def find_network(module: nn.Module) -> str:
    """Name of the network: the deepest submodule that contains all residual blocks, and what feeds them.

    Without residual blocks, all parameters take their place. A container (nn.Sequential, nn.ModuleList) belongs to the
    network that it is in. Where trained parameters come before the submodule, it is the next one that has those too.

    Raises:
        StageSelectionError: if there is nothing that trains, or several networks.
    """
    found = [block.name for block in find_blocks(module)] or [name for name, _ in module.named_parameters()]
    if not found:
        raise StageSelectionError("there is nothing to cut into stages: the module has no parameters.")
    name = _common([owner.rpartition(".")[0] for owner in found])
    while name and _is_part(module, name):
        name = _parent(name)
    outer = name
    while outer:
        outer = _parent(outer)
        if _trains_before(module.get_submodule(outer), name[len(outer) :].lstrip(".")):
            name = outer
    if not has_forward(module.get_submodule(name)):
        networks = [found[0] for found in _networks(module, name)]
        raise StageSelectionError(
            f"{describe(name)} has no forward of its own, and holds several networks: {', '.join(networks)}. Say which "
            f"one is cut into stages, e.g. network={networks[0]!r}."
        )
    return name


def check_network(module: nn.Module, name: str) -> None:
    """Raise a StageSelectionError unless the module has a submodule of that name with a forward of its own."""
    names = dict(module.named_modules(remove_duplicate=False))
    if name not in names:
        known = [child for child, _ in module.named_children()]
        raise StageSelectionError(f"network={name!r} is not found in the module; it has {', '.join(known)}.")
    if not has_forward(names[name]):
        raise StageSelectionError(
            f"network={name!r} has no forward of its own, so there is nothing to cut; name a module that is called."
        )


def describe(name: str) -> str:
    """The network, for messages."""
    return f"the network {name!r}" if name else "the module itself"


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Inside, the module is as in training; what tracing does to it and to random generators is undone."""
    random = random_state()
    try:
        with in_training(module), torch.enable_grad():
            yield
    finally:
        set_random_state(random)


def trace_network(network: nn.Module, name: str) -> tuple[ChainTracer, fx.Node, fx.Node]:
    """The forward of the network: what traced it, its input and its output. To be called inside :func:`unchanged`.

    Raises:
        StageSelectionError: if torch.fx cannot trace it, or a graph would compute something else.
    """
    if "forward" in vars(network):
        raise StageSelectionError(
            f"{describe(name)} cannot be cut into stages: its forward was replaced on the object. Put the new forward "
            "into its class."
        )
    blocks = {block.module for block in find_blocks(network)}
    opaque: set[nn.Module] = set()
    prefix = f"{name}." if name else ""
    before = random_state()
    while True:
        tracer = ChainTracer(_Leaves(blocks, opaque))
        try:
            graph = follow(tracer, network, prefix)
            break
        except CannotTrace as error:
            if blocks or not error.path:
                raise StageSelectionError(
                    f"the forward of {error.where} cannot be traced, so it cannot be cut into stages. torch.fx says"
                    f"{error.said}. The way out: put branches and loops that depend on a value or a shape into "
                    "submodules without residual blocks, or into the blocks: those are not looked into."
                ) from error
            opaque.add(network.get_submodule(error.path))
    _refuse_state(network, graph, name, before)
    return tracer, _input(network, graph, name), _output(graph, name)


class _Leaves:
    """Only what contains residual blocks is looked into; without any, everything but torch's own modules."""

    def __init__(self, blocks: set[nn.Module], opaque: set[nn.Module]) -> None:
        self._blocks, self._opaque = blocks, opaque

    def __call__(self, module: nn.Module) -> bool:
        if not self._blocks:
            return module in self._opaque or is_leaf(module)
        return module in self._blocks or not any(child in self._blocks for child in module.modules())


def _input(network: nn.Module, graph: fx.Graph, name: str) -> fx.Node:
    fixed = defaults(network)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    free = [node for node in inputs if not _is_fixed(node, fixed)]
    wanted = [node for node in free if node.users or not (str(node.target).startswith("*") or node.args)]
    if len(wanted) != 1:
        names = ", ".join(str(node.target) for node in wanted)
        raise StageSelectionError(
            f"{describe(name)} takes {len(wanted)} inputs ({names}), and stages pass one tensor on. Make it a module "
            "that takes one tensor, or name a part of it that does by network=."
        )
    found: fx.Node = wanted[0]
    return found


def _is_fixed(node: fx.Node, fixed: dict[str, object]) -> bool:
    """What torch.fx numbers: arguments that it was given a value for: ``mask_1``."""
    stem, _, number = str(node.target).rpartition("_")
    return stem in fixed and number.isdecimal()


def _output(graph: fx.Graph, name: str) -> fx.Node:
    returned = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    what = None
    if not isinstance(returned, fx.Node):
        what = f"a {type(returned).__name__}"
    elif isinstance(returned.target, type):
        what = f"a {returned.target.__name__}"
    elif returned.op in ("placeholder", "get_attr"):
        what = "its input, or a parameter"
    if what is not None:
        raise StageSelectionError(
            f"{describe(name)} returns {what}, and stages pass one tensor on. Return one tensor from it, or name a "
            "part of it that does by network=."
        )
    assert isinstance(returned, fx.Node)
    return returned


def _refuse_state(network: nn.Module, graph: fx.Graph, name: str, before: dict[str, object]) -> None:
    """What a forward does besides computing its output would be lost, or be what it was when it was traced."""
    problem = None
    left = left_behind(network, graph)
    constants = [node for node in graph.nodes if node.op == "get_attr" and str(node.target).startswith("_tensor_const")]
    if left:
        problem = f"leaves a value in an attribute{user_line(left[0])}"
    elif constants:
        users = [user for node in constants for user in node.users]
        problem = f"makes a tensor of constants{user_line(users[0]) if users else ''}: register it as a buffer"
    elif not _equal(before, random_state()):
        problem = "draws random numbers outside its blocks without a tensor that depends on its input"
    if problem is not None:
        raise StageSelectionError(f"{describe(name)} cannot be cut into stages: its forward {problem}.")


def _equal(one: object, other: object) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _common(names: list[str]) -> str:
    """The longest name that all begin with, up to a dot."""
    parts = [name.split(".") if name else [] for name in names]
    same = []
    for atoms in zip(*parts, strict=False):
        if len(set(atoms)) > 1:
            break
        same.append(atoms[0])
    return ".".join(same)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether a module is only a container, or one layer, of the network that it is in."""
    here, parent = module.get_submodule(name), module.get_submodule(_parent(name))
    if not has_forward(here):
        return True
    is_network = not isinstance(here, nn.Sequential) and not is_leaf(here)
    return not is_network and has_forward(parent) and not _is_lightning(parent)


def _is_lightning(module: nn.Module) -> bool:
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _trains_before(outer: nn.Module, path: str) -> bool:
    """Whether, in the forward of ``outer``, trained parameters come before its submodule at ``path``."""
    if not has_forward(outer):
        return False
    inner = outer.get_submodule(path)
    tracer = ChainTracer(lambda module: module is inner or all(child is not inner for child in module.modules()))
    try:
        graph = follow(tracer, outer, "")
    except CannotTrace:
        return False
    pending = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    seen = set(pending)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                pending.append(node)
    return any(_trains(outer, node) for node in seen if node.target != path)


def _trains(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return any(parameter.requires_grad for parameter in module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        return bool(getattr(attrgetter(str(node.target))(module), "requires_grad", False))
    return False


def _networks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with a forward and parameters in one that has no forward."""
    for child, inner in module.get_submodule(name).named_children():
        path = f"{name}.{child}".lstrip(".")
        if not any(True for _ in inner.parameters()):
            continue
        if has_forward(inner):
            yield path, inner
        else:
            yield from _networks(module, path)


def unreached(network: nn.Module, tracer: ChainTracer) -> str:
    """The residual blocks that the forward of the network never calls; empty if it calls all."""
    names = [block.name for block in find_blocks(network) if block.name not in tracer.calls]
    outer = [name for name in names if not any(name.startswith(f"{called}.") for called in tracer.calls)]
    return summary(outer)

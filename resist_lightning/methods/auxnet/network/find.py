"""Finds the network that is cut into stages within a user's module."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from torch import fx, nn

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.residual import find_blocks, untrained
from resist_lightning.methods.tracing import CannotTrace, ChainTracer, follow, has_forward, is_leaf


def find_network(module: nn.Module) -> str:
    """Name of the network: the deepest submodule that contains all residual blocks, and all trained before them.

    Without residual blocks, all parameters take their place. A container (nn.Sequential, nn.ModuleList) belongs to the
    network that it is in. Where trained parameters come before the submodule, it is the next one that has those too.

    Raises:
        StageSelectionError: if there is nothing that trains, or several networks.
    """
    name = _common([_parent(content) for content in _contents(module)])
    while name and _is_part(module, name):
        name = _parent(name)
    # Outward as far as trained parameters come first: the gradient of a guess would not reach them.
    outer = name
    while outer:
        outer = _parent(outer)
        if _trains_before(module.get_submodule(outer), name[len(outer) :].lstrip(".")):
            name = outer
    if not has_forward(module.get_submodule(name)):
        networks = ", ".join(f"network={path!r}" for path in _networks(module, name))
        raise StageSelectionError(
            f"{describe(name)} has no forward of its own. Name the network in it to cut into stages: "
            f"{networks or 'there is none'}."
        )
    return name


def _contents(module: nn.Module) -> list[str]:
    """Names of the residual blocks, or else of the parameters, that the network must contain."""
    blocks = find_blocks(module)
    still = untrained(module, blocks)
    # A teacher is no part of the network, unless nothing else has blocks.
    names = [block.name for block in blocks if block not in still]
    if not names:
        names = [block.name for block in blocks]
    if not names:
        names = [name for name, _ in module.named_parameters()]
    if not names:
        raise StageSelectionError("there is nothing to cut into stages: the module has no parameters.")
    return names


def check_network(module: nn.Module, name: str) -> None:
    """Raise a StageSelectionError unless the module has a submodule of that name with a forward of its own."""
    names = dict(module.named_modules(remove_duplicate=False))
    if name not in names:
        known = [child for child, _ in module.named_children()]
        raise StageSelectionError(f"network={name!r} is not found in the module; it has {', '.join(known)}.")
    # A forward that was replaced on the object is refused later, with its own reason.
    if not has_forward(names[name]) and "forward" not in vars(names[name]):
        raise StageSelectionError(
            f"network={name!r} has no forward of its own, so there is nothing to cut; name a module that is called."
        )


def describe(name: str) -> str:
    """The network, for messages."""
    return f"the network {name!r}" if name else "the module itself"


def _common(names: list[str]) -> str:
    """The longest name that all begin with, up to a dot."""
    parts = [name.split(".") if name else [] for name in names]
    same = []
    # The shortest name ends the comparison.
    for atoms in zip(*parts, strict=False):
        if len(set(atoms)) > 1:
            break
        same.append(atoms[0])
    return ".".join(same)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether a module is only a container, or one layer, of the network that it is in."""
    here = module.get_submodule(name)
    parent = module.get_submodule(_parent(name))
    if not has_forward(here):
        return True
    # A LightningModule that calls one layer or a Sequential is not itself the network.
    is_network = not isinstance(here, nn.Sequential) and not is_leaf(here)
    return not is_network and has_forward(parent) and not _is_lightning(parent)


def _is_lightning(module: nn.Module) -> bool:
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def _trains_before(outer: nn.Module, path: str) -> bool:
    """Whether, in the forward of ``outer``, trained parameters come before its submodule at ``path``."""
    if not has_forward(outer):
        return False
    inner = outer.get_submodule(path)
    # Only modules that contain the submodule are traced into.
    # By identity: metrics of torchmetrics are equal to any module.
    tracer = ChainTracer(lambda module: module is inner or all(child is not inner for child in module.modules()))
    try:
        graph = follow(tracer, outer, "")
    except CannotTrace:
        return False
    # Backward from the submodule through everything that it depends on.
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
        called = module.get_submodule(str(node.target))
        return any(parameter.requires_grad for parameter in called.parameters())
    if node.op == "get_attr":
        value = attrgetter(str(node.target))(module)
        return bool(getattr(value, "requires_grad", False))
    return False


def _networks(module: nn.Module, name: str) -> Iterator[str]:
    """The outermost modules with a forward and parameters in one that has no forward."""
    for child, inner in module.get_submodule(name).named_children():
        path = f"{name}.{child}".lstrip(".")
        if not has_forward(inner):
            yield from _networks(module, path)
        elif any(True for _ in inner.parameters()):
            yield path

"""Finds residual blocks by structure: classes with twins in a container, or else with siblings, and with an addition.

A guess, made before the network has run, for the default choice of blocks; the first forward of each block verifies it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections import Counter
from functools import cache
from typing import Any

from torch import nn

from resist_lightning.methods.residual import Block, block_at, recognise, why_not

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NETWORK = 3
_LIBRARIES = ("torch", "lightning", "typing", "abc")
_ADDITIONS = ("add", "add_", "addcmul", "add_relu")
_NO_TENSORS = (ast.Constant, ast.List, ast.ListComp, ast.Tuple)


def repeated_blocks(module: nn.Module) -> tuple[Block, ...]:
    """The modules that look like residual blocks and keep the shape of their input, in their order.

    If no container has twins among its children, siblings of one class will do, in any module: two blocks in each
    stage of which the first changes the shape, or blocks that are attributes of their stage.
    """
    found = _inside(module, "", _classes_of_twins(module))
    return tuple(found or _inside(module, "", _classes_of_siblings(module), anywhere=True))


def sections(blocks: tuple[Block, ...], module: nn.Module) -> dict[str, list[Block]]:
    """The blocks by the container that holds them, without the first child of each container.

    A container such as that of a layer's attention and MLP is one child of the container that holds all layers.
    """
    found: dict[str, list[Block]] = {}
    for block in blocks:
        section, child = _section(module, block.name)
        first = next(iter(module.get_submodule(section).children()))
        if child is not first:
            found.setdefault(section, []).append(block)
    return found


def _section(module: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The name of the innermost container where a block, or the container that it is in, has a twin; and this child."""
    path = name
    while path:
        section = path.rpartition(".")[0]
        container, child = module.get_submodule(section), module.get_submodule(path)
        if any(_are_twins(child, other) for other in container.children()):
            return section, child
        if not _only_contains(container):
            break
        path = section
    return name.rpartition(".")[0], module.get_submodule(name)


def _inside(module: nn.Module, name: str, classes: set[type], *, anywhere: bool = False) -> list[Block]:
    """The blocks inside a module: in its containers, or anywhere in it."""
    shapes = Counter(_shapes(child) for child in module.children())
    found: list[Block] = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        within = _inside(child, path, classes, anywhere=anywhere)
        # A module with many blocks of its own is a stage or a network, of an ensemble for example.
        contained = isinstance(module, _CONTAINERS)
        possible = len(within) < _NETWORK and (anywhere or contained)
        if possible and _is_candidate(child, classes, itself=not contained):
            block = recognise(path, child) or block_at(path, child)
            # A twin among the siblings takes their output as its input, so both keep the shape.
            twins = not anywhere and shapes[_shapes(child)] > 1
            if block.keeps_shape or (twins and why_not(child) is None):
                found.append(block)
                continue
        found.extend(within)
    return found


def _classes_of_twins(module: nn.Module) -> set[type]:
    """Classes of which some container holds twins, modules with tensors of the same shapes; or of parts of such twins.

    Parts, if the twins are containers: of the attention and the MLP of each layer, for example.
    """
    classes: set[type] = set()
    for container in module.modules():
        if isinstance(container, _CONTAINERS):
            counts = Counter(map(_shapes, container.children()))
            for child in container.children():
                if counts[_shapes(child)] > 1:
                    classes.update(_kinds(child))
    return classes


def _classes_of_siblings(module: nn.Module) -> set[type]:
    """Classes of which some module has several children."""
    classes: set[type] = set()
    for parent in module.modules():
        counts = Counter(map(type, parent.children()))
        classes.update(kind for kind, count in counts.items() if count > 1)
    return classes


def _kinds(module: nn.Module) -> set[type]:
    """The class of a module, and those of its parts if it does nothing but contain them."""
    parts = module.children() if _only_contains(module) else ()
    return {type(module)}.union(*map(_kinds, parts))


def _only_contains(module: nn.Module) -> bool:
    """Whether a module is a container without a forward of its own."""
    return isinstance(module, _CONTAINERS) and type(module).forward in (nn.Sequential.forward, nn.Module.forward)


def _is_candidate(child: nn.Module, classes: set[type], *, itself: bool) -> bool:
    """Whether a module of one of these classes looks residual: it has an addition itself, or some part of it."""
    if recognise("", child) is not None:
        return True
    if type(child) not in classes or why_not(child) is not None:
        return False
    # A sequence of blocks is no block: its parts are checked.
    if _only_contains(child):
        return False
    # Nor is one that only calls its parts in its own way.
    parts = (child,) if itself or isinstance(child, _CONTAINERS) else child.modules()
    kinds: set[Any] = set(map(type, parts))
    return any(map(_adds, kinds))


def _are_twins(module: nn.Module, other: nn.Module) -> bool:
    return module is not other and type(module) is type(other) and _shapes(module) == _shapes(other)


def _shapes(module: nn.Module) -> Any:
    """A key, equal for modules of one class with tensors of the same names and shapes, and layers of equal strides."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    strides = tuple(str(getattr(part, "stride", "")) for part in module.modules())
    return type(module), tuple((name, tensor.shape) for name, tensor in tensors), strides


@cache
def _adds(kind: Any) -> bool:  # Any, as mypy does not know that classes can be hashed
    """Whether a method of a class, inherited or not, has an addition; True if its source is not at hand.

    Constructors do not count, nor methods of torch and Lightning.
    """
    if issubclass(kind, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return True
    overridden: set[str] = set()
    for base in kind.__mro__:
        # Classes made by `exec` claim to be of `builtins`, too.
        if base.__module__.partition(".")[0] in _LIBRARIES or vars(builtins).get(base.__name__) is base:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return True
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        methods = [node for node in functions if not node.name.startswith("__") and node.name not in overridden]
        if any(_is_addition(node) for method in methods for node in ast.walk(method)):
            return True
        overridden |= {method.name for method in methods if not _calls_super(method)}
    return False


def _calls_super(method: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(method))


def _is_addition(node: ast.AST) -> bool:
    """Whether a node adds tensors, and not a literal number, as a counter would, or a list."""
    if isinstance(node, ast.BinOp):
        added = [node.left, node.right] if isinstance(node.op, ast.Add) else []
    elif isinstance(node, ast.AugAssign):
        added = [node.value] if isinstance(node.op, ast.Add) else []
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        added = node.args if name in _ADDITIONS else []
    else:
        added = []
    return bool(added) and not any(isinstance(value, _NO_TENSORS) for value in added)

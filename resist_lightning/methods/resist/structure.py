"""Finds residual blocks by structure: classes with twins in a container, and with an addition.

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


def repeated_blocks(module: nn.Module) -> tuple[Block, ...]:
    """The modules that look like residual blocks and keep the shape of their input, in their order."""
    return tuple(_inside(module, "", _block_classes(module)))


def sections(blocks: tuple[Block, ...], module: nn.Module) -> dict[str, list[Block]]:
    """The blocks by the container that holds them, without the first child of each container."""
    found: dict[str, list[Block]] = {}
    for block in blocks:
        container = module.get_submodule(block.section)
        first = next(iter(container.children()))
        if block.module is not first:
            found.setdefault(block.section, []).append(block)
    return found


def _inside(module: nn.Module, name: str, classes: set[type]) -> list[Block]:
    """The blocks inside a module."""
    shapes = Counter(_shapes(child) for child in module.children())
    found: list[Block] = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        within = _inside(child, path, classes)
        # A module with many blocks of its own is a stage or a network, of an ensemble for example.
        if len(within) < _NETWORK and isinstance(module, _CONTAINERS) and _is_candidate(child, classes):
            block = recognise(path, child) or block_at(path, child)
            # A twin among the siblings takes their output as its input, so both keep the shape.
            if block.keeps_shape or (shapes[_shapes(child)] > 1 and why_not(child) is None):
                found.append(block)
                continue
        found.extend(within)
    return found


def _block_classes(module: nn.Module) -> set[type]:
    """Classes of which some container holds twins: modules with tensors of the same shapes."""
    classes: set[type] = set()
    for container in module.modules():
        if isinstance(container, _CONTAINERS):
            counts = Counter(map(_shapes, container.children()))
            classes.update(shapes[0] for shapes, count in counts.items() if count > 1)
    return classes


def _is_candidate(child: nn.Module, classes: set[type]) -> bool:
    if recognise("", child) is not None:
        return True
    if type(child) not in classes or why_not(child) is not None:
        return False
    # A sequence of blocks is no block: its parts are checked.
    if type(child).forward is nn.Sequential.forward or isinstance(child, _CONTAINERS):
        return False
    kinds: set[Any] = {type(part) for part in child.modules()}
    return any(map(_adds, kinds))


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
    """Whether a node adds something other than a literal number, which a counter would."""
    if isinstance(node, ast.BinOp):
        added = [node.left, node.right] if isinstance(node.op, ast.Add) else []
    elif isinstance(node, ast.AugAssign):
        added = [node.value] if isinstance(node.op, ast.Add) else []
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        added = node.args if name in _ADDITIONS else []
    else:
        added = []
    return bool(added) and not any(isinstance(value, ast.Constant) for value in added)

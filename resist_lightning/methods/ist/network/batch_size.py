"""Tells which operations leave dimension 0 of a tensor, the batch, as it is.

A size that was read before frames, heads or a second input were folded into dimension 0 is not the size after it.
"""

from __future__ import annotations

from torch import fx, nn

from resist_lightning.methods.ist.network.modules import ELEMENTWISE, NORMS
from resist_lightning.methods.ist.network.operations import (
    PER_SAMPLE,
    Divided,
    Number,
    Value,
    argument,
    from_torch,
    operation_name,
    sizes_of,
)
from resist_lightning.methods.ist.network.tracing import Traced, Weighted

_MODULES = (Weighted, nn.PReLU, nn.Embedding, *ELEMENTWISE, *NORMS)
# The first dimension that a function changes, by the name of its argument.
_FIRST_DIMENSION = {"flatten": "start_dim", "unsqueeze": "dim"}


def batch_of(node: fx.Node, traced: Traced, values: dict[fx.Node, Value], batches: dict[fx.Node, str]) -> str:
    """The name of the node that made dimension 0 of a node: itself, where it may differ from those before.

    Args:
        node: the node.
        traced: the module that it is of.
        values: by node, the values of those before it.
        batches: by node, the same of those before it.
    """
    before = set()
    for source in node.all_input_nodes:
        # A parameter has no batch, and is broadcast.
        if source.op != "get_attr" and isinstance(values[source], Divided | None):
            before.add(batches[source])
    if len(before) == 1:
        (batch,) = before
        if _keeps(node, traced, values, batch):
            return batch
    return node.name


def _keeps(node: fx.Node, traced: Traced, values: dict[fx.Node, Value], batch: str) -> bool:
    """Whether an operation on tensors with one dimension 0 leaves it; False where that is not known."""
    if node.op == "call_module":
        _, module = traced.called(node)
        return isinstance(module, _MODULES) or (isinstance(module, nn.Flatten) and module.start_dim > 0)
    if not from_torch(node):
        return False
    name = operation_name(node)
    if name in ("view", "reshape"):
        first = sizes_of(node)[0]
        return isinstance(first, fx.Node) and values[first] == Number(batch)
    return name in PER_SAMPLE or _starts_behind_it(node, name)


def _starts_behind_it(node: fx.Node, name: str) -> bool:
    """Whether an operation on dimensions changes only those after the first."""
    if name in _FIRST_DIMENSION:
        dimension = argument(node, 1, _FIRST_DIMENSION[name], 0)
        return isinstance(dimension, int) and dimension > 0
    if name == "permute":
        return bool(sizes_of(node, "dims")[0] == 0)
    index = node.args[1] if name == "getitem" else None  # x[:, 0]
    return isinstance(index, tuple) and index[0] == slice(None)

"""Describes the effect of functions and methods on a tensor whose neurons are divided: per neuron, or not.

Three forms of a tensor with neurons in it, for a batch of N and a layer of H neurons::

    features   (N, ..., H)           made by a Linear: the neurons are the last dimension
    channels   (N, H, d1, .., dk)    made by a Conv: they are dimension 1, k positions follow
    flat       (N, H·d1·..·dk)       channels, flattened: every neuron has neighbouring entries
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import fx

Form: TypeAlias = Literal["features", "channels", "flat"]


@dataclass(frozen=True)
class Divided:
    """A tensor with the neurons of one layer in it.

    Args:
        layer: qualified name of the layer.
        width: number of its neurons.
        form: their place among the dimensions.
        positions: number of dimensions behind them; 0 unless the form is ``channels``.
        batch: its dimension 0, by the name of the node that made it: tensors with the same name have the same one.
    """

    layer: str
    width: int
    form: Form
    positions: int
    batch: str


@dataclass(frozen=True)
class Number:
    """A number that is the same in a subnet: batch size, number of positions, or a parameter with one entry.

    Args:
        batch: the dimension 0 whose size it is, as in :class:`Divided`; empty if it is of none.
    """

    batch: str = ""


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor; ``of`` is None if the tensor is whole, and ``batch`` is its dimension 0."""

    of: Divided | None
    batch: str = ""


@dataclass(frozen=True)
class Width:
    """A number that would be smaller in a subnet."""

    of: Divided


Value: TypeAlias = Divided | Number | Shape | Width | None
"""None is a tensor, or anything else, without neurons that could be divided."""


class NotPerNeuron(Exception):
    """The neurons of a layer cannot be divided; the message continues "its neurons"."""


DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
)

# Functions, methods and operators by one name each: in-place ones are looked up without their underscore.
_ELEMENTWISE_NAMES = """
    relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid hardshrink softplus
    softshrink softsign tanhshrink threshold logsigmoid sigmoid tanh sin cos tan asin acos atan sinh cosh asinh acosh
    atanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal abs absolute neg negative pos positive sign
    erf erfc floor ceil round trunc frac clamp clip clamp_min clamp_max nan_to_num pow float_power add sub subtract
    mul multiply div divide truediv true_divide floordiv floor_divide mod remainder fmod iadd isub imul itruediv ipow
    maximum minimum where lerp gt ge lt le eq ne logical_not masked_fill heaviside contiguous clone detach float
    double half bfloat16 to cpu cuda type
"""
_ELEMENTWISE = DROPOUTS | frozenset(_ELEMENTWISE_NAMES.split())
_KNOWN_PACKAGES = ("torch", "_operator", "math", "builtins")
_ADDITIONS = frozenset({"add", "iadd", "sub", "subtract", "isub"})
_JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
_POOLING = frozenset(
    f"{kind}_pool{rank}d"
    for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max", "fractional_max")
    for rank in (1, 2, 3)
)
_RESIZING = frozenset({"interpolate", "upsample", "instance_norm"})
PER_SAMPLE = _ELEMENTWISE | _POOLING | _RESIZING
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})


def over_positions(value: Divided, what: str, kind: str) -> Divided:
    """A tensor after pooling or padding; ``kind`` may end with the number of their dimensions (``MaxPool2d``).

    torch would take a tensor with one dimension less as one without a batch, and the neurons as positions.
    """
    dimensions = value.positions
    if kind[-2:] in ("1d", "2d", "3d"):
        dimensions = int(kind[-2])
    if value.form != "channels" or dimensions != value.positions:
        raise NotPerNeuron(
            f"reach {what}, which is per neuron only before flattening and after a convolution of as many dimensions"
        )
    return value


def flatten(value: Divided, start: int, end: int) -> Divided:
    """A tensor after flattening from one dimension to another."""
    last = value.positions + 1
    if value.form == "channels" and end in (-1, last):
        if start == 1:
            return replace(value, form="flat", positions=0)
        if 2 <= start <= last:
            return replace(value, positions=start - 1)
    if value.form != "channels" and start == 1 and end == -1:
        # Wrong for features with more dimensions, whose number is not known; the next layer's size then shows it.
        return value
    raise NotPerNeuron(f"are flattened from dimension {start} to {end}, which mixes them with another dimension")


def operation_name(node: fx.Node) -> str:
    """Name of a function or method, without the underscore of in-place ones."""
    name = node.target
    if not isinstance(name, str):
        name = getattr(name, "__name__", str(name))
    return str(name).rstrip("_")


def from_torch(node: fx.Node) -> bool:
    """Whether a function or method is torch's, or an operator, so that its name says what it does."""
    return node.op != "call_function" or _home(node).partition(".")[0] in _KNOWN_PACKAGES


def _home(node: fx.Node) -> str:
    # The `__module__` of torch's built-in functions is None.
    return getattr(node.target, "__module__", None) or "torch"


def operate(node: fx.Node, value: Divided, others: list[Value]) -> Value:
    """The value of a call of a function or method on a tensor with divided neurons, and on other values.

    Raises:
        NotPerNeuron: if it is not per neuron.
    """
    name = operation_name(node)
    if not from_torch(node):
        raise NotPerNeuron(f"reach {name}(), a function of {_home(node)}, which is not traced")
    # A tensor may be combined with itself, as in `x * sigmoid(x)`: the same neurons meet.
    others = [other for other in others if other != value]
    only_numbers = all(isinstance(other, Number) for other in others)
    if name in _ELEMENTWISE:
        if not only_numbers:
            raise NotPerNeuron(_combined(name))
        return value
    if name in ("view", "reshape"):
        return _view(node, value, others)
    if name in _JOINS or not only_numbers:
        raise NotPerNeuron(_combined(name))
    if name in _POOLING | _RESIZING:
        return over_positions(value, f"{name}()", name)
    # Unknown operations are refused: a wrong guess would silently train another network.
    special: dict[str, Callable[[fx.Node, Divided], Divided]] = {"flatten": _flatten, "pad": _pad}
    special.update(dict.fromkeys(_REDUCTIONS, _reduce))
    if name not in special:
        raise NotPerNeuron(f"reach {name}(), which is not known to be per neuron{_HINTS.get(name, '')}")
    return special[name](node, value)


_HEADS = "heads of attention stay whole: the neurons of a head must stay together, in query, key and value at once"
_HINTS = {
    "getitem": " (indexing)",
    "squeeze": " (flatten(1) is)",
    "chunk": " (views of heads or halves are not)",
    "unflatten": f" ({_HEADS})",
    "getattr": " (of attributes, shape is)",
}


def _combined(name: str) -> str:
    if name in _ADDITIONS:
        return (
            f"are combined by {name} with another value of the network; in residual networks "
            'strategy="resist" deals out the blocks'
        )
    if name in _JOINS:
        return f"are concatenated ({name}) with other values"
    return f"reach {name}() together with another value of the network"


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position or name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _flatten(node: fx.Node, value: Divided) -> Divided:
    start = argument(node, 1, "start_dim", 0)
    end = argument(node, 2, "end_dim", -1)
    return flatten(value, start, end)


def sizes_of(node: fx.Node, name: str = "shape") -> list[Any]:
    """The sizes that a call of ``view``, ``reshape`` or ``permute`` is given, one by one or together."""
    sizes = list(node.args[1:])
    if not sizes:
        # `view` and `reshape` name them differently.
        sizes = [node.kwargs.get(name, node.kwargs.get("size"))]
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = list(sizes[0])
    return sizes


def _view(node: fx.Node, value: Divided, others: list[Value]) -> Divided:
    """Flattening in the form of ``view(batch, -1)``; ``others`` are the values of the sizes."""
    sizes, what = sizes_of(node), f"reach {operation_name(node)}()"
    flattens = len(sizes) == 2 and isinstance(sizes[0], fx.Node) and sizes[1] == -1
    if not flattens or len(others) != 1 or not isinstance(others[0], Number) or not others[0].batch:
        raise NotPerNeuron(
            f"{what} to a shape that is not (x.size(0), -1): a width that is written as a number does not fit a "
            f"subnet; x.flatten(1) does. If it is a view of heads: {_HEADS}"
        )
    # With another first size, as of clips whose frames were folded into the batch, entries are not in neurons' order.
    if others[0].batch != value.batch:
        raise NotPerNeuron(
            f"{what} to (n, -1), where n is not known to be dimension 0 of the tensor itself: it was read from another "
            "one, and view, flatten, cat and the like stand between. Where they are equal, x.flatten(1) says so"
        )
    return flatten(value, 1, -1)


def _pad(node: fx.Node, value: Divided) -> Divided:
    sides = argument(node, 1, "pad", ())
    # Two numbers for each dimension, from the last one on.
    positions_only = isinstance(sides, list | tuple) and len(sides) <= 2 * value.positions
    if value.form == "channels" and positions_only:
        return value
    raise NotPerNeuron("reach pad() in their own dimension")


def _reduce(node: fx.Node, value: Divided) -> Divided:
    dims = argument(node, 1, "dim", None)
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    rank = value.positions + 2
    reduced = {dim % rank for dim in dims if isinstance(dim, int) and -rank <= dim < rank}
    # Each reduced dimension must be one of the positions.
    over_them = len(reduced) == len(dims) and reduced and min(reduced) >= 2
    if value.form != "channels" or not over_them:
        given = f"dim={dims[0] if len(dims) == 1 else tuple(dims)}" if dims else ""
        raise NotPerNeuron(
            f"reach {operation_name(node)}({given}): only the positions of a convolution's output (dimensions from 2 "
            "on) may be reduced"
        )
    if argument(node, 2, "keepdim", False):
        return value
    positions = value.positions - len(reduced)
    return replace(value, positions=positions, form="channels" if positions else "features")


def shape_entry(shape: Shape, index: Any) -> Value:
    """The value of ``x.shape[index]`` or ``x.size(index)``."""
    of = shape.of
    if index == 0:
        return Number(shape.batch)
    if of is None:
        if isinstance(index, int):
            return Number()
        # The first entry of `x.shape[2:]` is no batch size.
        from_first = isinstance(index, slice) and index.start in (None, 0) and index.step in (None, 1)
        return Shape(None, shape.batch if from_first else "")
    if of.form == "channels" and isinstance(index, int):
        is_position = index >= 2 or -of.positions <= index < 0
        if is_position:
            return Number()
    return Width(of)


def entries_per_neuron(value: Divided, size: int, consumer: str) -> int:
    """Number of neighbouring entries of each neuron among the ``size`` inputs of a layer."""
    # Flattened positions; features and channels have one entry.
    if value.form == "flat" and size % value.width == 0:
        return size // value.width
    if value.form != "flat" and size == value.width:
        return 1
    raise NotPerNeuron(f"({value.width}) do not divide the {size} inputs of {consumer}")

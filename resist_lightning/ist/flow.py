"""Which tensors and layers the neurons of each Linear and Conv reach: an abstract interpretation of a traced module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from resist_lightning.ist.operations import (
    DROPOUTS,
    NORMS,
    TRANSPARENT,
    Divided,
    NotPerNeuron,
    Number,
    Shape,
    Value,
    Width,
    argument,
    elementwise_module,
    entries_per_neuron,
    flatten,
    operate,
    operation_name,
    over_positions,
    position_module,
    shape_entry,
)
from resist_lightning.ist.tracing import Traced, Weighted, user_line

_KINDS = ("device", "dtype", "ndim")


@dataclass
class Layer:
    """What was found of the neurons of one Linear or Conv.

    Args:
        name: its qualified name.
        width: how many neurons it has.
        hidden: whether they reach another layer with weights, in whatever way.
        rows: tensors whose dimension 0 they are.
        columns: tensors whose dimension 1 they are, with the entries per neuron.
        sizes: module, attribute and entries per neuron of the numbers that follow.
        rescaled: layers that read them, with no norm straight behind.
        problems: why they cannot be divided; each goes on after "its neurons".
    """

    name: str
    width: int
    hidden: bool = False
    rows: list[str] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[str, str, int]] = field(default_factory=list)
    rescaled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Flow:
    """Follows the neurons through one traced module.

    Args:
        traced: the module.

    Attributes:
        layers: what was found of each Linear and Conv, by qualified name, in the order of the computation.
        accessed: tensors that a forward reads itself, by id, with the line of code.
    """

    def __init__(self, traced: Traced) -> None:
        self.layers: dict[str, Layer] = {}
        self.accessed: dict[int, str] = {}
        self._traced = traced
        self._calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        self._values: dict[fx.Node, Value] = {}
        self._reaching: dict[fx.Node, frozenset[str]] = {}
        for node in traced.graph.nodes:
            self._reaching[node] = frozenset().union(*(self._reaching[source] for source in node.all_input_nodes))
            self._values[node] = self._follow(node)

    def _follow(self, node: fx.Node) -> Value:
        divided = [value for value in map(self._values.get, node.all_input_nodes) if isinstance(value, Divided | Width)]
        owners = {value.of.layer if isinstance(value, Width) else value.layer for value in divided}
        try:
            if node.op == "call_module":
                return self._module(node)
            if node.op == "get_attr":
                return self._attribute(node)
            if node.op == "output" and divided:
                raise NotPerNeuron("reach the output of the module")
            if node.op in ("call_function", "call_method"):
                return self._call(node)
        except NotPerNeuron as problem:
            for owner in sorted(owners):
                self._refuse(owner, str(problem), node)
        return None

    def _refuse(self, layer: str, problem: str, node: fx.Node) -> None:
        self.layers[layer].problems.append(problem + user_line(node))

    def _attribute(self, node: fx.Node) -> Value:
        _, tensor = self._traced.tensor(node)
        if not isinstance(tensor, Tensor):
            return None
        if not node.users or not all(map(_reads_kind, node.users)):
            self.accessed[id(tensor)] = user_line(node)
        return Number() if tensor.numel() == 1 else None

    def _call(self, node: fx.Node) -> Value:
        name = operation_name(node)
        values = [self._values[source] for source in node.all_input_nodes]
        if any(source.op == "get_attr" and self._is_matrix(source) for source in node.all_input_nodes):
            self._mark_hidden(node)
        read = self._read_of_shape(node, name)
        if read is not None:
            return read
        divided = [value for value in values if isinstance(value, Divided)]
        if any(isinstance(value, Width | Shape) for value in values):
            if divided or any(isinstance(value, Width) for value in values):
                raise NotPerNeuron("are counted (size, shape), and there are fewer in a subnet")
            return None
        if divided:
            first = node.all_input_nodes.index(next(n for n in node.all_input_nodes if self._values[n] == divided[0]))
            return operate(node, divided[0], values[:first] + values[first + 1 :])
        numbers = bool(values) and all(isinstance(value, Number) for value in values)
        return Number() if numbers and getattr(node.target, "__module__", "") == "_operator" else None

    def _is_matrix(self, node: fx.Node) -> bool:
        _, tensor = self._traced.tensor(node)
        return isinstance(tensor, Tensor) and tensor.dim() > 1

    def _read_of_shape(self, node: fx.Node, name: str) -> Value:
        """What ``x.shape``, ``x.size()``, ``x.size(i)``, ``x.shape[i]``, ``x.dtype`` are; None for anything else."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        value = self._values[source]
        of = value if isinstance(value, Divided) else None
        if name == "getitem" and isinstance(value, Shape):
            return shape_entry(value, node.args[1])
        if name == "size":
            index = argument(node, 1, "dim", None)
            return Shape(of) if index is None else shape_entry(Shape(of), index)
        if name == "getattr" and node.args[1] == "shape":
            return Shape(of)
        if name in ("dim", "ndimension") or (name == "getattr" and node.args[1] in _KINDS):
            return Number()
        return None

    def _module(self, node: fx.Node) -> Value:
        name, module = self._traced.called(node)
        values = [self._values[source] for source in node.all_input_nodes]
        value = next((value for value in values if isinstance(value, Divided)), None)
        if isinstance(module, Weighted):
            return self._weighted(node, name, module, value)
        if value is None or elementwise_module(module):
            if not isinstance(module, NORMS) and any(True for _ in module.parameters()):
                self._leave(node)
            return value
        if isinstance(module, NORMS):
            return self._norm(node, name, module, value)
        if isinstance(module, nn.PReLU):
            return self._prelu(node, name, module, value)
        if isinstance(module, nn.Flatten):
            return flatten(value, module.start_dim, module.end_dim)
        what = f"{name!r} ({type(module).__name__})"
        if position_module(module):
            return over_positions(value, what)
        self._leave(node)
        raise NotPerNeuron(f"reach {what}, which is not per neuron")

    def _mark_hidden(self, node: fx.Node) -> None:
        for layer in self._reaching[node]:
            self.layers[layer].hidden = True

    def _leave(self, node: fx.Node) -> None:
        """A module with weights of its own ends the way of the neurons."""
        if any(True for _ in self._traced.called(node)[1].parameters()):
            self._mark_hidden(node)
            self._reaching[node] = frozenset()

    def _weighted(self, node: fx.Node, name: str, module: Weighted, value: Divided | None) -> Value:
        self._mark_hidden(node)
        self._reaching[node] = frozenset({name})
        rank = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        made = self.layers.setdefault(name, Layer(name, width))
        problem = self._cannot_cut(node, name, module, {"weight", "bias"})
        if problem:
            self._refuse(name, f"are made by {problem}", node)
        own = [f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
        made.rows = own
        made.sizes.insert(0, (name, "out_features" if rank == 0 else "out_channels", 1))
        output = Divided(name, width, "channels" if rank else "features", rank)
        if value is not None:
            try:
                self._read(node, name, module, value, problem)
            except NotPerNeuron as reason:
                self._refuse(value.layer, str(reason), node)
        return output

    def _read(self, node: fx.Node, name: str, module: Weighted, value: Divided, problem: str) -> None:
        """A Linear or Conv whose input neurons are divided."""
        if problem:
            raise NotPerNeuron(f"reach {problem}")
        rank = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
        if rank != value.positions:
            raise NotPerNeuron(f"reach {name!r} ({type(module).__name__}) in a dimension that it does not sum over")
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        repeat = entries_per_neuron(value, inputs, repr(name))
        layer = self.layers[value.layer]
        layer.columns[f"{name}.weight"] = repeat
        layer.sizes.append((name, "in_features" if rank == 0 else "in_channels", repeat))
        if not self._goes_into_norm(node):
            layer.rescaled.append(name)

    def _goes_into_norm(self, node: fx.Node) -> bool:
        """Whether all that reads a node is a norm, but for identities and dropout in between."""

        def is_norm(user: fx.Node) -> bool:
            if user.op == "call_module":
                module = self._traced.called(user)[1]
                return isinstance(module, NORMS) or (isinstance(module, TRANSPARENT) and self._goes_into_norm(user))
            return operation_name(user) in DROPOUTS and self._goes_into_norm(user)

        return bool(node.users) and all(map(is_norm, node.users))

    def _norm(self, node: fx.Node, name: str, module: nn.Module, value: Divided) -> Divided:
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            attribute, size = "normalized_shape", tuple(module.normalized_shape)
            fits = value.form != "channels" and size == (value.width,)
        elif isinstance(module, nn.GroupNorm):
            attribute, size = "num_channels", (module.num_channels,)
            fits = size == (value.width,) and module.num_groups == 1
        else:
            assert isinstance(module, _BatchNorm | _InstanceNorm)
            attribute, size = "num_features", (module.num_features,)
            fits = size == (value.width,) and (isinstance(module, _BatchNorm) or value.form == "channels")
        what = f"{name!r} ({type(module).__name__})"
        if not fits:
            raise NotPerNeuron(
                f"reach {what}, which is not a norm of exactly these {value.width} neurons in one group "
                f"({module.extra_repr()}); after a convolution it must stand before the flattening"
            )
        vectors = {"weight", "bias", "running_mean", "running_var"}
        self._follow_vectors(node, name, module, value, (attribute, vectors))
        return value

    def _prelu(self, node: fx.Node, name: str, module: nn.PReLU, value: Divided) -> Divided:
        if module.num_parameters == 1:
            return value
        if module.num_parameters != value.width:
            raise NotPerNeuron(
                f"reach {name!r} (PReLU), which has {module.num_parameters} parameters for {value.width} neurons"
            )
        self._follow_vectors(node, name, module, value, ("num_parameters", {"weight"}))
        return value

    def _follow_vectors(
        self, node: fx.Node, name: str, module: nn.Module, value: Divided, what: tuple[str, set[str]]
    ) -> None:
        """A module with a size and vectors of one entry per neuron."""
        attribute, vectors = what
        problem = self._cannot_cut(node, name, module, {*vectors, "num_batches_tracked"})
        if problem:
            raise NotPerNeuron(f"reach {problem}")
        layer = self.layers[value.layer]
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        layer.rows += [f"{name}.{vector}" for vector, tensor in own.items() if vector in vectors and tensor is not None]
        layer.sizes.append((name, attribute, 1))

    def _cannot_cut(self, node: fx.Node, name: str, module: nn.Module, tensors: set[str]) -> str:
        """Why the tensors of a module cannot be cut; empty if they can."""
        what = f"{name!r} ({type(module).__name__})"
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            return f"{what}, which has no sizes yet; run the network once"
        if isinstance(module, _ConvNd) and module.groups > 1:
            return f"{what}, a grouped or depthwise convolution (groups={module.groups})"
        if self._calls[node.target] > 1:
            return f"{what}, which is called {self._calls[node.target]} times"
        found = {key for key, _ in [*module.named_parameters(), *module.named_buffers()]}
        if found - tensors:
            return (
                f"{what}, which has other tensors than its class ({', '.join(sorted(found - tensors))}): a weight "
                "norm, a parametrization or a mask"
            )
        return ""


def _reads_kind(node: fx.Node) -> bool:
    return operation_name(node) == "getattr" and node.args[1] in _KINDS

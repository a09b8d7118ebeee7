"""Follows the neurons of each Linear and Conv through a traced module, by abstract interpretation of its graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.ist.network.batch_size import batch_of
from resist_lightning.methods.ist.network.modules import (
    ELEMENTWISE,
    MIXING_POSITIONS,
    NORMS,
    cannot_cut,
    inputs_of,
    norm_size,
    norms_behind,
    outputs_of,
    positions_of,
    titled,
    torch_class,
)
from resist_lightning.methods.ist.network.operations import (
    Divided,
    NotPerNeuron,
    Number,
    Shape,
    Value,
    Width,
    argument,
    entries_per_neuron,
    flatten,
    operate,
    operation_name,
    over_positions,
    shape_entry,
)
from resist_lightning.methods.ist.network.tracing import Traced, Weighted
from resist_lightning.methods.tracing import user_line

_KINDS = ("device", "dtype", "ndim")


@dataclass
class Layer:
    """All tensors and modules that the neurons of one Linear or Conv reach.

    Args:
        name: its qualified name.
        width: number of its neurons.
        hidden: whether they reach another layer with weights, in whatever way.
        rows: names of tensors whose dimension 0 they are.
        columns: names of tensors whose dimension 1 they are, with the entries per neuron.
        sizes: module, attribute and entries per neuron of the attributes that change with the subnet.
        rescaled: layers that read them, with no norm straight behind.
        rescaled_if_frozen: layers that read them, with norms of these names straight behind that may be frozen.
        passed: module, whether it is its input, and dimension of the neurons, where a hook of torch.nn sees them.
        problems: reasons why they cannot be divided; each continues "its neurons".
    """

    name: str
    width: int
    hidden: bool = False
    rows: list[str] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[str, str, int]] = field(default_factory=list)
    rescaled: list[str] = field(default_factory=list)
    rescaled_if_frozen: dict[str, tuple[str, ...]] = field(default_factory=dict)
    passed: list[tuple[str, bool, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Flow:
    """Follows the neurons through one traced module.

    Attributes:
        layers: each Linear and Conv, by qualified name, in the order of the computation.
        accessed: tensors that a forward reads itself, by id, with the line of code.
    """

    def __init__(self, traced: Traced) -> None:
        self.layers: dict[str, Layer] = {}
        self.accessed: dict[int, str] = {}
        self._traced = traced
        self._calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        self._values: dict[fx.Node, Value] = {}
        # By node, the layers whose neurons it depends on, with no other layer in between.
        self._reaching: dict[fx.Node, frozenset[str]] = {}
        # By node, the name of the node that made its dimension 0.
        self._batches: dict[fx.Node, str] = {}
        for node in traced.graph.nodes:
            sources = [self._reaching[source] for source in node.all_input_nodes]
            self._reaching[node] = frozenset().union(*sources)
            self._batches[node] = batch_of(node, traced, self._values, self._batches)
            value = self._values[node] = self._follow(node)
            if isinstance(value, Divided):
                self._batches[node] = value.batch
        for node in traced.stored:
            owner = _owner(self._values[node])
            if owner is not None:
                self._refuse(owner.layer, "are stored in an attribute of a module, where any loss may read them", node)

    def _follow(self, node: fx.Node) -> Value:
        """The value of a node; where neurons cannot be followed, their layers get a problem, and it is None."""
        values = [self._values[source] for source in node.all_input_nodes]
        try:
            value = self._interpret(node, values)
        except NotPerNeuron as problem:
            owners = [_owner(value) for value in values]
            layers = {owner.layer for owner in owners if owner is not None}
            for layer in sorted(layers):
                self._refuse(layer, str(problem), node)
            return None
        if node.op == "call_module":
            name, _ = self._traced.called(node)
            for seen, before in [(value, False), *((given, True) for given in values)]:
                if isinstance(seen, Divided):
                    self.layers[seen.layer].passed.append((name, before, -1 if seen.form == "features" else 1))
        return value

    def _interpret(self, node: fx.Node, values: list[Value]) -> Value:
        if node.op == "get_attr":
            return self._attribute(node)
        # Before widths are refused: `x.size(0)` is the batch, which is the same in a subnet.
        read = self._read_of_shape(node)
        if read is not None:
            return read
        if any(isinstance(value, Shape | Width) and value.of is not None for value in values):
            raise NotPerNeuron("are counted (size, shape), but a subnet has fewer")
        divided = [value for value in values if isinstance(value, Divided)]
        if node.op == "call_module":
            return self._module(node, divided[0] if divided else None)
        if node.op == "output" and divided:
            raise NotPerNeuron("reach the output of the module")
        return self._call(node, values)

    def _refuse(self, layer: str, problem: str, node: fx.Node) -> None:
        self.layers[layer].problems.append(problem + user_line(node))

    def _attribute(self, node: fx.Node) -> Value:
        tensor = self._traced.attributes[str(node.target)]
        if not isinstance(tensor, Tensor):
            return None
        # Its device or data type may be read: they are the same in a subnet.
        if not node.users or not all(map(_reads_kind, node.users)):
            self.accessed[id(tensor)] = user_line(node)
        return Number() if tensor.numel() == 1 else None

    def _call(self, node: fx.Node, values: list[Value]) -> Value:
        # A product with a matrix that the forward reads itself is a layer, too.
        if any(source.op == "get_attr" and self._is_matrix(source) for source in node.all_input_nodes):
            self._mark_hidden(node)
        for index, value in enumerate(values):
            if isinstance(value, Divided):
                others = values[:index] + values[index + 1 :]
                return operate(node, value, others)
        # Arithmetic on sizes, as in `x.size(0) * 2`.
        arithmetic = getattr(node.target, "__module__", "") == "_operator"
        if arithmetic and values and all(isinstance(value, Number) for value in values):
            return Number()
        return None

    def _is_matrix(self, node: fx.Node) -> bool:
        tensor = self._traced.attributes[str(node.target)]
        return isinstance(tensor, Tensor) and tensor.dim() > 1

    def _read_of_shape(self, node: fx.Node) -> Value:
        """The value of ``x.shape``, ``x.size()``, ``x.size(i)``, ``x.shape[i]`` or ``x.dtype``; None for others."""
        source = node.args[0] if node.args else None
        if node.op not in ("call_function", "call_method") or not isinstance(source, fx.Node):
            return None
        name, value = operation_name(node), self._values[source]
        if _reads_kind(node) or name in ("dim", "ndimension"):
            return Number()
        if name == "getitem" and isinstance(value, Shape):
            return shape_entry(value, node.args[1])
        is_shape = name == "size" or (name == "getattr" and node.args[1] == "shape")
        # Dimension 0 of a parameter is not the batch.
        if not is_shape or source.op == "get_attr":
            return None
        shape = Shape(value if isinstance(value, Divided) else None, self._batches[source])
        index = argument(node, 1, "dim", None) if name == "size" else None
        return shape if index is None else shape_entry(shape, index)

    def _module(self, node: fx.Node, value: Divided | None) -> Value:
        name, module = self._traced.called(node)
        if isinstance(module, Weighted):
            return self._weighted(node, name, module, value)
        # With whole values, a norm's vectors are whole, too.
        if isinstance(module, NORMS):
            return self._norm(node, name, module, value) if value else None
        if isinstance(module, nn.PReLU):
            return self._prelu(node, name, module, value) if value else None
        if value is None or isinstance(module, ELEMENTWISE):
            self._leave(node, module)
            return value
        if isinstance(module, nn.Flatten):
            return flatten(value, module.start_dim, module.end_dim)
        if isinstance(module, MIXING_POSITIONS):
            return over_positions(value, titled(name, module), torch_class(module))
        self._leave(node, module)
        raise NotPerNeuron(f"reach {titled(name, module)}, which is not per neuron")

    def _mark_hidden(self, node: fx.Node) -> None:
        for layer in self._reaching[node]:
            self.layers[layer].hidden = True

    def _leave(self, node: fx.Node, module: nn.Module) -> None:
        """Stop following neurons at a module with weights of its own."""
        if any(True for _ in module.parameters()):
            self._mark_hidden(node)
            self._reaching[node] = frozenset()

    def _weighted(self, node: fx.Node, name: str, module: Weighted, value: Divided | None) -> Divided:
        self._mark_hidden(node)
        # The output has this layer's neurons only.
        self._reaching[node] = frozenset({name})
        attribute, width = outputs_of(module)
        made = self.layers.setdefault(name, Layer(name, width))
        made.rows = [f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
        made.sizes.append((name, attribute, 1))
        problem = cannot_cut(name, module, {"weight", "bias"}, self._calls[node.target])
        if problem:
            self._refuse(name, f"are made by {problem}", node)
        if value:
            # Caught here: the problem is that of the layer before, and this layer's own neurons can be followed.
            try:
                self._read(node, name, module, value, problem)
            except NotPerNeuron as reason:
                self._refuse(value.layer, str(reason), node)
        positions = positions_of(module)
        return Divided(name, width, "channels" if positions else "features", positions, self._batches[node])

    def _read(self, node: fx.Node, name: str, module: Weighted, value: Divided, problem: str) -> None:
        """Note that a Linear or Conv reads divided neurons."""
        if problem:
            raise NotPerNeuron(f"reach {problem}")
        if positions_of(module) != value.positions:
            raise NotPerNeuron(f"reach {titled(name, module)} in a dimension that it does not sum over")
        attribute, inputs = inputs_of(module)
        repeat = entries_per_neuron(value, inputs, repr(name))
        layer = self.layers[value.layer]
        layer.columns[f"{name}.weight"] = repeat
        layer.sizes.append((name, attribute, repeat))
        norms = norms_behind(self._traced, node)
        if norms is None:
            layer.rescaled.append(name)
        # A norm makes up for the smaller sum, unless it is frozen, with the statistics of the sum over all neurons.
        elif norms:
            layer.rescaled_if_frozen[name] = tuple(norms)

    def _norm(self, node: fx.Node, name: str, module: nn.Module, value: Divided) -> Divided:
        attribute = norm_size(name, module, value)
        self._cut_vectors(node, name, module, value, attribute)
        return value

    def _prelu(self, node: fx.Node, name: str, module: nn.PReLU, value: Divided) -> Divided:
        # One slope for all neurons is whole on every worker.
        if module.num_parameters == 1:
            return value
        if module.num_parameters != value.width:
            raise NotPerNeuron(
                f"reach {titled(name, module)}, which has {module.num_parameters} parameters for {value.width} neurons"
            )
        self._cut_vectors(node, name, module, value, "num_parameters")
        return value

    def _cut_vectors(self, node: fx.Node, name: str, module: nn.Module, value: Divided, attribute: str) -> None:
        """Note a module with a size, and with vectors of one entry per neuron."""
        vectors = {"weight", "bias", "running_mean", "running_var"}
        problem = cannot_cut(name, module, {*vectors, "num_batches_tracked"}, self._calls[node.target])
        if problem:
            raise NotPerNeuron(f"reach {problem}")
        layer = self.layers[value.layer]
        layer.rows += [f"{name}.{tensor}" for tensor in named_tensors(module) if tensor in vectors]
        layer.sizes.append((name, attribute, 1))


def _owner(value: Value) -> Divided | None:
    """The divided tensor behind a value: the value itself, or the tensor whose shape it is from."""
    if isinstance(value, Shape | Width):
        return value.of
    return value if isinstance(value, Divided) else None


def _reads_kind(node: fx.Node) -> bool:
    return operation_name(node) == "getattr" and node.args[1] in _KINDS

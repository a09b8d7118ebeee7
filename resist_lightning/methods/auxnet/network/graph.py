"""Cuts the torch.fx graph of a network into a chain of units, each with one tensor in and one tensor out.

    x -> stem -> block -> | -> block -> | -> block -> pool -> head -> y
         -------- unit 0    - unit 1      ------------------ unit 2

A cut is possible where only the output of a block crosses it: no other value, and no tensor of the network that is
used on both sides. In a network without blocks the output of any module may, and the sum of a residual connection.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add, attrgetter, getitem, iadd

import torch
from torch import fx, nn

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.tracing import ChainTracer, user_line

_SHOWN = 3
_SUMS = (add, iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Unit:
    """The nodes between two neighbouring cut points.

    Args:
        end: name in the network of the module that the unit ends with.
        nodes: its computation, in order; without parameters and buffers that a forward reads itself.
        entry: its input.
        exit: its output.
        tensors: ids of the parameters and buffers that it uses.
    """

    end: str
    nodes: tuple[fx.Node, ...]
    entry: fx.Node
    exit: fx.Node
    tensors: frozenset[int]


class Cuts:
    """Finds the places where a graph can be cut.

    Args:
        network: the traced module.
        tracer: the tracer that has traced it.
        entry: the network's input.
        exit: the network's output.
        blocks: names of the residual blocks in the network; empty: a cut may be behind any module.
    """

    def __init__(
        self, network: nn.Module, tracer: ChainTracer, entry: fx.Node, exit: fx.Node, blocks: Collection[str]
    ) -> None:
        self._network = network
        self._calls = tracer.calls  # number of calls of each module
        self._entry, self._exit = entry, exit
        self._blocks = blocks
        self._nodes = computing(entry)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._ends: dict[fx.Node, str] = {}
        for node, name in tracer.ends.items():
            end = self._one_tensor(node)
            if end in self._place and self._may_end(node):
                self._ends.setdefault(end, name)
        if not blocks:
            self._add_sums()
        self._last_use: dict[fx.Node, int] = {}
        for node in [entry, *self._nodes]:
            uses = [self._place_of_user(user) for user in node.users]
            self._last_use[node] = max(uses, default=-1)
        self._tensors = [_tensors(network, node) for node in self._nodes]
        # For each tensor: from the first node that uses it to before the last one.
        self._span: dict[int, range] = {}
        for place, tensors in enumerate(self._tensors):
            for tensor in tensors:
                first = self._span[tensor].start if tensor in self._span else place
                self._span[tensor] = range(first, place)
        self._parameters = {id(parameter) for parameter in network.parameters()}

    def units(self) -> list[Unit]:
        """The smallest units, in order of computation."""
        starts = [0]
        for place, node in enumerate(self._nodes[:-1]):
            if node in self._ends and not self._crossing(place):
                starts.append(place + 1)
        parts: list[range] = []
        for start, stop in pairwise([*starts, len(self._nodes)]):
            part = range(start, stop)
            # A part that is too small for a stage is joined to its neighbour.
            if parts and not (self._stands_alone(parts[-1]) and self._stands_alone(part)):
                parts[-1] = range(parts[-1].start, stop)
            else:
                parts.append(part)
        return [self._unit(part.start, part.stop) for part in parts]

    def why_none(self) -> str:
        """The reason why there is no place to cut at, as a sentence."""
        kind = "residual block" if self._blocks else "module"
        if not self._ends:
            return f"its forward calls no {kind}"
        if len(self._ends) == 1:
            return f"it has only one {kind}"
        reasons = []
        for node, name in self._ends.items():
            crossing = self._crossing(self._place[node])
            if crossing:
                reasons.append(f"behind {name!r}, {', '.join(crossing)}")
        if not reasons:
            return f"only one {kind} of it has parameters"
        return f"more than the output of one {kind} would cross the cut: {_few(reasons)}"

    def _may_end(self, node: fx.Node) -> bool:
        """Whether a unit may end with a node: that of a block, or, in a network without blocks, of any module."""
        return not self._blocks or (node.op == "call_module" and node.target in self._blocks)

    def _add_sums(self) -> None:
        """Let units end with sums too: in ``x = x + layer(x)`` the layer's output crosses no cut alone, the sum does.

        A sum has the name of the module before it.
        """
        module = ""
        for node in self._nodes:
            if node in self._ends:
                module = self._ends[node]
            elif module and _is_sum(node):
                self._ends[node] = module

    def _one_tensor(self, node: fx.Node) -> fx.Node | None:
        """The tensor of a module's value that may cross a cut: of a tuple, the first item if no other is used."""
        items = [user for user in node.users if _is_item(user)]
        if not items:
            return node
        used = [item for item in items if item in self._place]
        called = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
        # Recurrent and attention layers that are not `batch_first` return tensors whose first dimension is the time.
        if len(used) == 1 and used[0].args[1] == 0 and getattr(called, "batch_first", True):
            return self._one_tensor(used[0])
        return None

    def _crossing(self, place: int) -> list[str]:
        """The values and tensors besides the value at ``place`` that are used behind it, in words."""
        before = [self._entry, *self._nodes[:place]]
        crossing = [_describe(node) for node in before if self._last_use[node] > place]
        tied = {tensor for tensor, span in self._span.items() if place in span}
        if tied:
            names = [name for name, tensor in named_tensors(self._network).items() if id(tensor) in tied]
            crossing.append(f"{_few(names)} (used on both sides)")
        return crossing

    def _place_of_user(self, user: fx.Node) -> int:
        if user.op == "output":
            return len(self._nodes)
        return self._place.get(user, -1)

    def _stands_alone(self, part: range) -> bool:
        """Whether a part can be a stage: it has a block, or, in a network without blocks, parameters."""
        if self._blocks:
            return any(self._nodes[place] in self._ends for place in part)
        return any(self._tensors[place] & self._parameters for place in part)

    def _unit(self, start: int, stop: int) -> Unit:
        nodes = self._nodes[start:stop]
        ends = [self._ends[node] for node in nodes if node in self._ends]
        # A module that is called several times names no place; a cut is named by one that is called once, if possible.
        once = [end for end in ends if self._calls[end] == 1]
        last = stop == len(self._nodes)
        return Unit(
            end=(once or ends or [""])[-1],
            nodes=tuple(nodes),
            entry=self._nodes[start - 1] if start else self._entry,
            exit=self._exit if last else nodes[-1],
            tensors=frozenset().union(*self._tensors[start:stop]),
        )


def computing(entry: fx.Node) -> list[fx.Node]:
    """The nodes of a graph that compute: no inputs, tensors that are read, or checks of optional arguments.

    Items of a tuple that nothing uses are left out: ``output, _ = lstm(x)``.
    """
    # Optional arguments have their defaults: nodes that depend on them alone are constant.
    checks = {node for node in entry.graph.nodes if node.op == "placeholder" and node is not entry}
    nodes: dict[fx.Node, None] = {}
    for node in entry.graph.nodes:
        if not checks.isdisjoint(node.all_input_nodes):
            checks.add(node)
        elif node.op not in ("placeholder", "get_attr", "output"):
            nodes[node] = None
    unused: set[fx.Node] = set()
    for node in reversed(nodes):
        if _is_item(node) and unused.issuperset(node.users):
            unused.add(node)
    return [node for node in nodes if node not in unused]


def _is_item(node: fx.Node) -> bool:
    """Whether a node takes an item, by number or name: of a tuple, a dict, or along a tensor's first dimension."""
    return node.target is getitem and isinstance(node.args[1], int | str)


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values that are computed; not a parameter or a number to one."""
    added = [value for value in node.args[:2] if isinstance(value, fx.Node) and value.op != "get_attr"]
    return node.target in _SUMS and len(added) == 2


def build(network: nn.Module, units: Sequence[Unit], *, copies_input: bool) -> fx.GraphModule:
    """Neighbouring units as one module with the network's own submodules, parameters and buffers."""
    graph = fx.Graph()
    entry = graph.placeholder("x")
    # A block may write into its input, which belongs to the worker.
    made = {units[0].entry: entry}
    if copies_input:
        made[units[0].entry] = graph.call_method("clone", (entry,))
    for unit in units:
        for node in unit.nodes:
            # Tensors that the forward reads itself are no nodes of a unit, and are added where they are used first.
            for value in node.all_input_nodes:
                if value.op == "get_attr" and value not in made:
                    made[value] = graph.node_copy(value)
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[units[-1].exit])
    return fx.GraphModule(network, graph, "Stage")


def _tensors(network: nn.Module, node: fx.Node) -> set[int]:
    """Ids of the parameters and buffers that a node uses, in its module and as arguments."""
    found: set[int] = set()
    if node.op == "call_module":
        called = network.get_submodule(str(node.target))
        found.update(map(id, named_tensors(called).values()))
    for value in node.all_input_nodes:
        if value.op == "get_attr":
            found.add(id(attrgetter(str(value.target))(network)))
    # A forward may read other attributes, too.
    return found.intersection(map(id, named_tensors(network).values()))


def _few(parts: Sequence[str]) -> str:
    shown = list(parts[:_SHOWN])
    if len(parts) > _SHOWN:
        shown.append(f"and {len(parts) - _SHOWN} more")
    return "; ".join(shown)


def _describe(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the network's input {node.target!r}"
    if node.op == "call_module":
        return f"the output of {node.target!r}{user_line(node)}"
    return f"{node.name!r}{user_line(node)}"

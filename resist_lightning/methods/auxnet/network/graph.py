"""The forward of a network as a chain of units, each with one tensor in and one tensor out, by torch.fx.

    x -> stem -> block -> | -> block -> | -> block -> pool -> head -> y
         -------- unit 0    - unit 1      ------------------ unit 2

A cut is possible where the output of a block is all that crosses it: no other value, and no tensor of the network that
is used on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from torch import Tensor, fx, nn

from resist_lightning.methods.tracing import ChainTracer, user_line

_SHOWN = 3


@dataclass(frozen=True)
class Unit:
    """What lies between two neighbouring cut points.

    Args:
        end: name in the network of the module that it ends with.
        nodes: what it computes, in order; parameters and buffers that a forward reads itself are not among them.
        entry: the value that comes in.
        exit: the value that goes out.
        tensors: ids of the parameters and buffers that it uses.
    """

    end: str
    nodes: tuple[fx.Node, ...]
    entry: fx.Node
    exit: fx.Node
    tensors: frozenset[int]


class Cuts:
    """Where a graph can be cut.

    Args:
        network: the traced module.
        tracer: what traced it.
        entry: the network's input.
        exit: the network's output.
        blocks: names of the residual blocks in the network; empty: a cut may be behind any module.
    """

    def __init__(
        self, network: nn.Module, tracer: ChainTracer, entry: fx.Node, exit: fx.Node, blocks: Collection[str]
    ) -> None:
        self._network = network
        self._calls = tracer.calls
        self._entry, self._exit = entry, exit
        self._blocks = blocks
        self._nodes = computing(entry)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._ends = {node: name for node, name in tracer.ends.items() if node in self._place and self._may_end(node)}
        self._last_use = {node: max(map(self._place_of_user, node.users), default=-1) for node in [entry, *self._nodes]}
        self._tensors = [_tensors(network, node) for node in self._nodes]
        self._span: dict[int, range] = {}  # of each tensor: from the first node that uses it to the last
        for place, tensors in enumerate(self._tensors):
            for tensor in tensors:
                first = self._span[tensor].start if tensor in self._span else place
                self._span[tensor] = range(first, place)
        self._parameters = {id(parameter) for parameter in network.parameters()}

    def units(self) -> list[Unit]:
        """The smallest units, in order of computation."""
        places = [place for node, place in self._place.items() if node in self._ends and not self._crossing(place)]
        parts: list[range] = []
        for start, stop in pairwise(
            [0, *(place + 1 for place in places if place + 1 < len(self._nodes)), len(self._nodes)]
        ):
            part = range(start, stop)
            if parts and not (self._stands_alone(parts[-1]) and self._stands_alone(part)):
                parts[-1] = range(parts[-1].start, stop)
            else:
                parts.append(part)
        return [self._unit(part.start, part.stop) for part in parts]

    def why_none(self) -> str:
        """Why there is no place to cut at, as a sentence."""
        what = "residual block" if self._blocks else "module"
        if len(self._ends) < 2:
            return f"it has only one {what}" if self._ends else f"its forward calls no {what}"
        crossings = [(node, self._crossing(self._place[node])) for node in self._ends]
        reasons = [f"behind {self._ends[node]!r}, {', '.join(what)}" for node, what in crossings if what]
        if not reasons:
            return f"only one {what} of it has parameters"
        return f"more than the output of one {what} would cross the cut: {_few(reasons)}"

    def _may_end(self, node: fx.Node) -> bool:
        return not self._blocks or (node.op == "call_module" and node.target in self._blocks)

    def _crossing(self, place: int) -> list[str]:
        """What else than the value at ``place`` is used behind it."""
        before = [self._entry, *self._nodes[:place]]
        values = [_describe(node) for node in before if self._last_use[node] > place]
        tied = {tensor for tensor, span in self._span.items() if place in span}
        names = _names(self._network, tied)
        return values + ([f"{_few(names)} (used on both sides)"] if names else [])

    def _place_of_user(self, user: fx.Node) -> int:
        return len(self._nodes) if user.op == "output" else self._place.get(user, -1)

    def _stands_alone(self, part: range) -> bool:
        """Whether it is a stage's worth: it has a block, or, in a network without blocks, something to train."""
        if self._blocks:
            return any(self._nodes[place] in self._ends for place in part)
        return any(self._tensors[place] & self._parameters for place in part)

    def _unit(self, start: int, stop: int) -> Unit:
        nodes = self._nodes[start:stop]
        ends = [self._ends[node] for node in nodes if node in self._ends]
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
    """What a graph computes: without inputs, tensors that are read, and checks of optional arguments."""
    checks = {node for node in entry.graph.nodes if node.op == "placeholder" and node is not entry}
    nodes = []
    for node in entry.graph.nodes:
        if not checks.isdisjoint(node.all_input_nodes):
            checks.add(node)
        elif node.op not in ("placeholder", "get_attr", "output"):
            nodes.append(node)
    return nodes


def build(network: nn.Module, units: Sequence[Unit], *, copies_input: bool) -> fx.GraphModule:
    """Neighbouring units as one module with the network's own submodules, parameters and buffers."""
    graph = fx.Graph()
    entry = graph.placeholder("x")
    made = {units[0].entry: graph.call_method("clone", (entry,)) if copies_input else entry}
    for node in (node for unit in units for node in unit.nodes):
        for read in (value for value in node.all_input_nodes if value.op == "get_attr" and value not in made):
            made[read] = graph.node_copy(read)
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[units[-1].exit])
    return fx.GraphModule(network, graph, "Stage")


def _tensors(network: nn.Module, node: fx.Node) -> set[int]:
    """Ids of the parameters and buffers that a node uses."""
    if node.op == "call_module":
        called = network.get_submodule(str(node.target))
        return {id(tensor) for tensor in (*called.parameters(), *called.buffers())}
    own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    read = (value for value in node.all_input_nodes if value.op == "get_attr")
    return {id(attrgetter(str(value.target))(network)) for value in read} & own


def _names(network: nn.Module, ids: set[int]) -> list[str]:
    named: list[tuple[str, Tensor]] = [*network.named_parameters(), *network.named_buffers()] if ids else []
    return [name for name, tensor in named if id(tensor) in ids]


def _few(parts: Sequence[str]) -> str:
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return "; ".join([*parts[:_SHOWN], *more])


def _describe(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the network's input {node.target!r}"
    if node.op == "call_module":
        return f"the output of {node.target!r}{user_line(node)}"
    return f"{node.name!r}{user_line(node)}"

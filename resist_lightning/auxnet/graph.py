"""The forward of a network as a chain of units, each with one tensor in and one tensor out, by torch.fx.

    x -> stem -> block -> | -> block -> | -> block -> pool -> head -> y
         -------- unit 0    - unit 1      ------------------ unit 2

A cut is possible where the output of a block is all that crosses it: no other value, and no tensor of the network that
is used on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from resist_lightning.tracing import Tracer, user_line

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


class ChainTracer(Tracer):
    """Notes which module made which value, and refuses what a graph does not keep.

    Args:
        leaf: whether a module is not looked into.

    Attributes:
        ends: the innermost module that returned a value, by name.
        calls: how often each module was called, by name.
    """

    def __init__(self, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.ends: dict[fx.Node, str] = {}
        self.calls: dict[str, int] = {}
        self._leaf = leaf
        self._modes = _modes()

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        self.calls[path] = self.calls.get(path, 0) + 1
        if isinstance(result, fx.Proxy):
            self.ends.setdefault(result.node, path)
        return result

    @override
    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError(
                "no_grad, autocast and their like are not kept when a forward is cut; a block may use them"
            )
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in devices))


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
        self._tensors = [_tensors(network, node) for node in self._nodes]
        self._ends = {node: name for node, name in tracer.ends.items() if node in self._place and self._may_end(node)}

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
        names = list(dict.fromkeys(self._ends.values()))
        if len(names) < 2:
            return f"it has only one {what}" if names else f"its forward calls no {what}"
        crossings = [(node, self._crossing(self._place[node])) for node in self._ends]
        reasons = [f"behind {self._ends[node]!r}, {', '.join(what)}" for node, what in crossings if what]
        if not reasons:
            return f"only one {what} of it has parameters"
        more = f"; and so on behind {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        return f"more than the output of one {what} would cross the cut: {'; '.join(reasons[:_SHOWN])}{more}"

    def _may_end(self, node: fx.Node) -> bool:
        return not self._blocks or (node.op == "call_module" and node.target in self._blocks)

    def _crossing(self, place: int) -> list[str]:
        """What else than the value at ``place`` is used behind it."""
        before = [self._entry, *self._nodes[:place]]
        values = [_describe(node) for node in before if any(self._is_behind(user, place) for user in node.users)]
        tied = _ids(self._tensors[: place + 1]) & _ids(self._tensors[place + 1 :])
        return values + [f"{name!r} (used on both sides)" for name in _names(self._network, tied)]

    def _is_behind(self, user: fx.Node, place: int) -> bool:
        return user.op == "output" or self._place.get(user, -1) > place

    def _stands_alone(self, part: range) -> bool:
        """Whether it is a stage's worth: it has a block, or, in a network without blocks, something to train."""
        if self._blocks:
            return any(self._nodes[place] in self._ends for place in part)
        parameters = {id(parameter) for parameter in self._network.parameters()}
        return bool(_ids(self._tensors[part.start : part.stop]) & parameters)

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
            tensors=frozenset(_ids(self._tensors[start:stop])),
        )


def computing(entry: fx.Node) -> list[fx.Node]:
    """What a graph computes: without inputs, tensors that are read, and checks of arguments that have a default."""
    nodes = [node for node in entry.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    return [node for node in nodes if not any(_is_other_input(value, entry) for value in node.all_input_nodes)]


def _is_other_input(node: fx.Node, entry: fx.Node) -> bool:
    """An optional argument kept its default, so that only fx's own check of it is left."""
    return node.op == "placeholder" and node is not entry


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
        return {id(tensor) for tensor in _all_tensors(called)}
    return {id(attrgetter(str(read.target))(network)) for read in node.all_input_nodes if read.op == "get_attr"}


def _all_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _names(network: nn.Module, ids: set[int]) -> list[str]:
    named = [*network.named_parameters(), *network.named_buffers()]
    return [name for name, tensor in named if id(tensor) in ids]


def _ids(sets: Sequence[set[int]]) -> set[int]:
    return set().union(*sets)


def _describe(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the network's input {node.target!r}"
    if node.op == "call_module":
        return f"the output of {node.target!r}{user_line(node)}"
    return f"{node.name!r}{user_line(node)}"

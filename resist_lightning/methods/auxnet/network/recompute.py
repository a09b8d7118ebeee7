"""Keeps a network's activation checkpointing in its stages: a traced graph alone would compute without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import getitem
from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from resist_lightning.methods.tracing import RECOMPUTED


def keep_recomputing(network: nn.Module, parts: fx.GraphModule) -> fx.GraphModule:
    """A graph like ``parts`` that computes again, in the backward pass, what the network's forward does.

    Args:
        network: the traced network, whose tensors the graph's code is called with.
        parts: some nodes of its graph, with marks where it was traced inside of ``torch.utils.checkpoint``.

    Returns:
        The graph; ``parts`` itself where nothing is marked.
    """
    if not any(RECOMPUTED in node.meta for node in parts.graph.nodes):
        return parts
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    run: list[fx.Node] = []  # the nodes of one call of `checkpoint`
    for node in parts.graph.nodes:
        call = node.meta.get(RECOMPUTED) if node.op.startswith("call") else None
        # Tensors that are read, by a call or later ones, are given to it.
        if run and node.op != "get_attr" and call != run[0].meta[RECOMPUTED]:
            _add_call(network, graph, run, made)
            run = []
        if call is None:
            made[node] = graph.node_copy(node, made.__getitem__)
        else:
            run.append(node)
    return fx.GraphModule(network, graph, "Stage")


def _add_call(network: nn.Module, graph: fx.Graph, run: Sequence[fx.Node], made: dict[fx.Node, fx.Node]) -> None:
    """Add some nodes to a graph as one call, whose results are computed again in the backward pass."""
    inside = set(run)
    given: dict[fx.Node, None] = {}
    for node in run:
        given.update(dict.fromkeys(value for value in node.all_input_nodes if value not in inside))
    results = [node for node in run if not inside.issuperset(node.users)]
    part = fx.Graph()
    copied = {value: part.placeholder(value.name) for value in given}
    for node in run:
        copied[node] = part.node_copy(node, copied.__getitem__)
    part.output(tuple(copied[node] for node in results))
    compute = _recomputed(network, fx.GraphModule(network, part, "Recomputed"))
    call = graph.call_function(compute, tuple(made[value] for value in given))
    for number, node in enumerate(results):
        made[node] = graph.call_function(getitem, (call, number))


def _recomputed(network: nn.Module, part: fx.GraphModule) -> Callable[..., Any]:
    def recomputed(*given: Any) -> Any:
        return checkpoint(partial(type(part).forward, network), *given, use_reentrant=False)

    return recomputed

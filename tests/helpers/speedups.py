"""Trains with two workers, and with the simulator, in each setting of precision and speed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._dynamo.utils import counters
from torch.nn import functional

from resist_lightning import Config, Engine, NeuronConfig, NeuronSimulator, Simulator
from tests.helpers.processes import run_workers
from tests.helpers.speedup_settings import (
    COUNTING,
    LOCAL_STEPS,
    SETTINGS,
    STEPS,
    WORKERS,
    Setting,
    batch_of,
    is_channels_last,
    make_network,
)
from tests.helpers.training import clone_state

# Counting of compiled code.

_GRAPHS: list[int] = []


@register_backend(name=COUNTING)
def _count(graph: Any, inputs: list[Tensor]) -> Any:
    """Run a graph as it is, and note its number of operations."""
    _GRAPHS.append(sum(node.op.startswith("call_") for node in graph.graph.nodes))
    return graph.forward


@dataclass(frozen=True)
class Compiled:
    """Counts of torch.compile in a training.

    Args:
        graphs: number of graphs.
        operations: in all graphs.
        later: number of graphs made after the first round.
        breaks: number of graph breaks.
    """

    graphs: int
    operations: int
    later: int
    breaks: int


@dataclass(frozen=True)
class Found:
    """A worker's results of a training.

    Args:
        state: of the full model.
        reported: its outputs in the setting.
        checked: whether the check of the setting has passed.
        compiled: counts of compiled code in training.
        folded: names of the tensors that carry the scale.
        blocks: number of blocks.
    """

    state: dict[str, Tensor]
    reported: Tensor
    checked: bool
    compiled: Compiled
    folded: tuple[str, ...]
    blocks: int


# Trainings.


def config_for(method: str, setting: Setting) -> Any:
    options: dict[str, Any] = {"local_steps": LOCAL_STEPS, "momentum": setting.momentum}
    if method == "ist":
        return NeuronConfig(**{**options, "momentum": setting.ist_momentum or setting.momentum})
    blocks = ["images.[01]", "tokens.[01]"] if method == "resist" else []
    return Config(**options, blocks=blocks, min_blocks=1 if blocks else None)


def train_cells(worker: int, cells: list[tuple[str, str]]) -> list[Found]:
    """A worker's trainings, one after another."""
    return [train(worker, *cell) for cell in cells]


def train(worker: int, name: str, method: str) -> Found:
    """A worker's training of a cell; returns its results."""
    setting = SETTINGS[name]
    torch._dynamo.reset()
    _GRAPHS.clear()
    counters.clear()
    net = prepared(name, method)
    optimizers = setting.optimizers(net)
    engine = Engine(net, optimizers, config_for(method, setting), forward_context=setting.context)
    engine.start()
    take = setting.make_step()
    first = 0
    for step in range(STEPS):
        net.train()
        take(net, optimizers, partial(loss_of, setting, net, batch_of(worker, step)))
        engine.after_step()
        if engine.clock.round == 1 and not first:
            first = len(_GRAPHS)
    compiled = Compiled(len(_GRAPHS), sum(_GRAPHS), len(_GRAPHS) - first, sum(counters["graph_break"].values()))
    with engine.full_model():
        reported = outputs(setting, net)
        state = clone_state(net)
    checked = setting.check(net)
    engine.finish()
    blocks = getattr(engine.layout, "blocks", ())
    return Found(state, reported, checked, compiled, tuple(engine.layout.scaling.tensors()), len(blocks))


def simulate(name: str, method: str) -> dict[str, Tensor]:
    """The full model of the same training by the reference simulator, in an equivalent setting."""
    return _simulate(SETTINGS[name].like or name, method)


@cache
def _simulate(name: str, method: str) -> dict[str, Tensor]:
    setting = SETTINGS[name]
    kind: Any = NeuronSimulator if method == "ist" else Simulator
    simulator = kind(prepared(name, method), setting.optimizers, config_for(method, setting), WORKERS)
    takes = [setting.make_step() for _ in range(WORKERS)]
    for step in range(STEPS):
        for number, (worker, take) in enumerate(zip(simulator.workers, takes, strict=True)):
            worker.module.train()
            take(worker.module, worker.optimizers, partial(loss_of, setting, worker.module, batch_of(number, step)))
        simulator.after_step()
    return clone_state(simulator.full_model())


def plain_outputs(name: str, method: str, state: dict[str, Tensor]) -> Tensor:
    """Outputs of the full model in a plain network, not compiled and untouched by this package."""
    setting = SETTINGS[name]
    net = make_network(method)
    net.to(next(iter(state.values())).dtype)
    net.load_state_dict(state)
    return outputs(setting, net)


def prepared(name: str, method: str) -> nn.Module:
    setting = SETTINGS[name]
    net = make_network(method, setting.reentrant)
    setting.prepare(net, method)
    return net


def loss_of(setting: Setting, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    with setting.context():
        return functional.cross_entropy(net(like(x, net)).float(), labels)


def outputs(setting: Setting, net: nn.Module) -> Tensor:
    net.eval()
    with torch.no_grad(), setting.context():
        return net(like(batch_of(100, 0)[0], net)).clone()


def like(x: Tensor, net: nn.Module) -> Tensor:
    """Images in the data type and the memory format of a network."""
    memory = torch.channels_last if is_channels_last(net) else torch.contiguous_format
    return x.to(next(net.parameters()).dtype).to(memory_format=memory)


def train_all(cells: list[tuple[str, str]]) -> dict[tuple[str, str], list[Found]]:
    """Each worker's results, by cell."""
    by_worker = run_workers(train_cells, WORKERS, cells)
    return {cell: [found[number] for found in by_worker] for number, cell in enumerate(cells)}


def operations_of(module: nn.Module, x: Tensor) -> int:
    """Number of operations that torch.compile captures of a module in plain training mode."""
    torch._dynamo.reset()
    _GRAPHS.clear()
    torch.compile(module.train(), backend=COUNTING, fullgraph=True)(x)
    return sum(_GRAPHS)

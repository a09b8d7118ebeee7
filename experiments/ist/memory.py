"""Measures the memory of IST's workers while they train, from their live tensors, and has the closed form of it."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.memory import resident_bytes, storage_bytes
from experiments.harness.workers import forked
from experiments.networks import mlp
from experiments.trainers import sgd_step
from resist_lightning import Engine, NeuronConfig
from resist_lightning.methods.ist.layout import NeuronLayout

DEPTH, CLASSES, BATCH = 4, 35, 16  # three hidden layers, so that two matrices have hidden neurons on both sides
ROUNDS, LOCAL_STEPS = 2, 2


@dataclass(frozen=True)
class Group:
    """Workers whose memory is measured: their number, and the size of their network."""

    workers: int
    width: int
    inputs: int


def measure_group(group: Group) -> dict[str, Any]:
    """Start the workers, let them train, and gather the bytes that each of them held after every local step."""
    told = forked(_train, group, group.workers)
    return {"workers": group.workers, "width": group.width, **told[0].pop("full"), "by_worker": told}


def _train(worker: int, group: Group) -> dict[str, Any]:
    bare = resident_bytes()
    torch.manual_seed(0)
    model = mlp(in_features=group.inputs, num_classes=CLASSES, depth=DEPTH, width=group.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    engine = Engine(model, [optimizer], NeuronConfig(local_steps=LOCAL_STEPS, min_share=0))
    assert isinstance(engine.layout, NeuronLayout)
    full, inner = sizes(engine.layout), sorted(engine.layout.inner())
    engine.start()
    steps = []
    for _ in range(ROUNDS * LOCAL_STEPS):
        sgd_step(model, optimizer, torch.randn(BATCH, group.inputs), torch.zeros(BATCH).long())
        # On the host, entries that nobody trains.
        stored = storage_bytes(engine.resumption.state_dict()["store"].values())
        steps.append({**_held(model, optimizer, inner), "store": stored, "resident": resident_bytes()})
        engine.after_step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engine.abandon()
    return {"full": full, "steps": steps, "bare_resident": bare, "peak_resident": peak}


def sizes(layout: NeuronLayout) -> dict[str, int]:
    """Bytes of the full model's parameters: those with hidden neurons on both sides, on one side, and shared by all."""
    parameters = dict(layout.module.named_parameters())
    inner = layout.inner()
    shared = _bytes(p for name, p in parameters.items() if name in layout.shared)
    two_sided = _bytes(p for name, p in parameters.items() if name in inner)
    return {"inner": two_sided, "outer": _bytes(parameters.values()) - two_sided - shared, "shared": shared}


def closed_form(group: Mapping[str, Any], slots: int = 1) -> dict[str, float]:
    """Bytes of a worker where each neuron has one holder, while it trains: parameters, gradients and ``slots`` of an optimizer (1: momentum)."""
    workers = group["workers"]
    inner, outer = group["inner"] / workers**2, group["outer"] / workers
    held = inner + outer + group["shared"]
    return {
        "held": (2 + slots) * held,
        "inner": (2 + slots) * inner,
        "store": group["inner"] / workers if workers > 1 else 0,
    }


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, inner: Sequence[str]) -> dict[str, int]:
    """Bytes of distinct storages: of parameters, gradients and momentum; and of all three of inner layers."""
    found: dict[str, list[Tensor]] = {"parameters": [], "gradients": [], "momentum": [], "inner": []}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        own = {"parameters": parameter, "gradients": parameter.grad, "momentum": momentum}
        for kind, tensor in own.items():
            if tensor is None:
                continue
            found[kind].append(tensor)
            if name in inner:
                found["inner"].append(tensor)
    return {kind: storage_bytes(tensors) for kind, tensors in found.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)

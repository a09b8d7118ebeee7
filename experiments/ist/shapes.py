"""The paper's networks: exact bytes of a round, measured seconds of a local step, and the speed-up over a link by formula."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import nn

from experiments.ist.cases import LOCAL_STEPS
from experiments.links.closed_form import neuron_bytes
from experiments.networks import mlp
from experiments.trainers import median_seconds, sgd_step
from resist_lightning import NeuronConfig
from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.state.optimizer_state import OptimizerStates

CLASSES, BATCH = 35, 128
WORKERS = (2, 4, 8)
GBITS = (0.1, 1.0, 10.0)
DEPTHS = {4096: 2, 8192: 3}  # the paper's: hidden width to linear layers. Other widths, of samples, get three.


@dataclass(frozen=True)
class Shape:
    """A network of the paper's form."""

    inputs: int
    width: int

    @property
    def depth(self) -> int:
        return DEPTHS.get(self.width, 3)

    def make(self, workers: int = 1) -> nn.Module:
        """The full model, or the subnet of one of so many workers."""
        return mlp(
            in_features=self.inputs,
            num_classes=CLASSES,
            depth=self.depth,
            width=self.width // workers,
            output_norm=True,
        )


def measure_shape(shape: Shape, rounds: int, steps: int) -> dict[str, Any]:
    """Bytes per worker, mean over so many rounds; median seconds over so many steps."""
    return {
        "width": shape.width,
        "depth": shape.depth,
        "weights": _weights(shape, 1),
        "seconds": {str(workers): step_seconds(shape, workers, steps) for workers in (1, *WORKERS)},
        "by_workers": [volumes(shape, workers, rounds) for workers in WORKERS],
    }


def volumes(shape: Shape, workers: int, rounds: int) -> dict[str, Any]:
    """Bytes that a worker sends: of IST and local SGD per round, of DDP per step."""
    with torch.device("meta"):
        network = shape.make()
    parameters = sum(p.nbytes for p in network.parameters())
    buffers = sum(b.nbytes for b in network.buffers())
    layout = NeuronLayout(network, NeuronConfig(local_steps=LOCAL_STEPS, min_share=0), workers)
    states = OptimizerStates([torch.optim.SGD(network.parameters(), 0.01)])
    sent = [neuron_bytes(layout, states, number) for number in range(rounds)]
    return {
        "workers": workers,
        "weights": _weights(shape, workers),
        "ist_round": mean(map(mean, sent)),
        "ist_round_most": max(map(max, sent)),
        "local_sgd_round": all_reduce_bytes(parameters + buffers, workers),
        "ddp_step": all_reduce_bytes(parameters, workers),
    }


def step_seconds(shape: Shape, workers: int, steps: int) -> float:
    """Median seconds of a local step of one worker, in one process of one thread, with plain SGD."""
    torch.manual_seed(0)
    network = shape.make(workers)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    inputs = torch.randn(BATCH, shape.inputs)
    labels = torch.randint(CLASSES, (BATCH,))
    (seconds,) = median_seconds([lambda: sgd_step(network, optimizer, inputs, labels)], steps)
    return seconds


def speed_up(row: dict[str, Any], volume: dict[str, Any], gbit: float) -> dict[str, float]:
    """Seconds per local step over a link, by formula, and IST's speed-up.

    For DDP as if all communication that can be hidden behind its compute were hidden: a lower bound.
    """
    full = row["seconds"]["1"]
    subnet = row["seconds"][str(volume["workers"])]

    def on_the_link(sent: float) -> float:
        return sent * 8 / gbit / 1e9

    ist = subnet + on_the_link(volume["ist_round_most"]) / LOCAL_STEPS
    local_sgd = full + on_the_link(volume["local_sgd_round"]) / LOCAL_STEPS
    ddp = max(full, on_the_link(volume["ddp_step"]))  # the longer one hides the other
    seconds = {"ist": ist, "local_sgd": local_sgd, "ddp": ddp}
    return {**seconds, "over_local_sgd": local_sgd / ist, "over_ddp": ddp / ist}


def _weights(shape: Shape, workers: int) -> int:
    with torch.device("meta"):
        return sum(layer.weight.numel() for layer in shape.make(workers) if isinstance(layer, nn.Linear))  # type: ignore[attr-defined]

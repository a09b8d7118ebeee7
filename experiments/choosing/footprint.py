"""Memory, traffic and computation of a worker of each method for a network, by the package's closed forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from experiments.ist import memory as neuron_memory
from experiments.links.closed_form import neuron_bytes
from experiments.paper_tables.networks import memory_bytes
from resist_lightning import Config, NeuronConfig
from resist_lightning.comm.byte_formulas import WIRE_FORMATS, ddp_bytes
from resist_lightning.comm.quantize import compressible, is_vector
from resist_lightning.errors import first_line
from resist_lightning.inspect import inspect_model
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.subnet import Subnet as NeuronSubnet
from resist_lightning.methods.residual import parameters_of
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.overview import ROUNDS, costs, count_flops
from resist_lightning.methods.resist.subnet import Subnet
from resist_lightning.schedule.transfers import plan_sync
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.outer import has_outer_step, outer_bytes

WHOLE, BLOCKS, NEURONS = "whole", "blocks", "neurons"  # parts of a network that a worker may hold
METHODS = {
    WHOLE: {"local_sgd": "none", "diloco": "nesterov"}, BLOCKS: {"resist": "none", "resist_outer": "nesterov"},
}  # fmt: skip
"""By the part that they hold, methods with their option ``outer``."""


@dataclass(frozen=True)
class Setting:
    """The user's choices beside network and link."""

    workers: int
    local_steps: int
    min_blocks: int | None = None
    wire: str = "fp32"
    slots: int = 1  # tensors of optimizer state per parameter: 1 for SGD with momentum, 2 for Adam

    def config(self, outer: str, **options: Any) -> Config:
        """The package's config."""
        return Config(local_steps=self.local_steps, wire=self.wire, outer=outer, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Footprint:
    """The footprint of a method; parameters and memory are those of the worker that holds the most."""

    method: str
    part: str  # WHOLE, BLOCKS or NEURONS
    parameters: int
    memory_bytes: int  # parameters, gradients, optimizer state, and copies that the method keeps
    sync_bytes: float  # that a worker sends at a sync: mean over workers and rounds
    slowest_bytes: float  # of the worker that sends the most: mean over rounds
    local_steps: int  # between two syncs
    messages: int  # of a sync, one after the other


@dataclass(frozen=True)
class Part:
    """A network as a worker will hold it: complete until `hold` is called."""

    module: nn.Module
    layout: BlockLayout | NeuronLayout | None
    hold: Callable[[], None]  # frees the parts of other workers


def divide(make: Callable[[], nn.Module], example: Tensor, setting: Setting) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts that a worker of some method can hold, and the reasons against the other parts.

    Args:
        make: makes the network; on the meta device, blocks are not judged by running them.
        example: an input of it, on its device.
        setting: the user's choices.
    """
    module = make()
    check_parameters(module)
    parts, refused = {WHOLE: Part(module, None, lambda: None)}, {}
    for name, divided in ((BLOCKS, _in_blocks), (NEURONS, _in_neurons)):
        try:
            parts[name] = divided(make(), example, setting)
        except ValueError as error:
            # The first clause has the reason; the others list remedies that do not apply here.
            refused[name] = re.split(r"[;.:] ", first_line(str(error)))[0]
    return parts, refused


def check_parameters(module: nn.Module) -> None:
    """Raise a ValueError unless all parameters train in 32 bits, as the closed forms of memory assume."""
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    if kinds != {"float32"}:
        raise ValueError(
            f"its parameters are {', '.join(sorted(kinds)) or 'none'}, and memory is computed for float32; cast it "
            "by .float(), and compute in 16 bits by Trainer(precision='bf16-mixed')"
        )


def footprints(parts: Mapping[str, Part], setting: Setting) -> list[Footprint]:
    """The footprint of each method that can train the network; call it before parts are held."""
    module = parts[WHOLE].module
    total = sum(parameter.numel() for parameter in module.parameters())
    gradients = ddp_bytes(4 * total, setting.workers, 1)
    ring = 2 * (setting.workers - 1)  # messages of an all-reduce, one after the other
    held = int(memory_bytes(total, 0, 0, setting.slots))
    found = [Footprint("ddp", WHOLE, total, held, gradients, gradients, 1, ring)]
    for outer in METHODS[WHOLE].items():
        found.append(_of_blocks(module, outer, WHOLE, setting, {"blocks": []}))
    if BLOCKS in parts:
        for outer in METHODS[BLOCKS].items():
            found.append(_of_blocks(parts[BLOCKS].module, outer, BLOCKS, setting, {"min_blocks": setting.min_blocks}))
    if NEURONS in parts:
        found.append(_of_neurons(parts[NEURONS].layout, setting))  # type: ignore[arg-type]
    return found


def _of_blocks(
    module: nn.Module, named: tuple[str, str], part: str, setting: Setting, options: dict[str, Any]
) -> Footprint:
    method, outer = named
    layout = BlockLayout(module, setting.config(outer, **options), setting.workers)
    found = costs(layout)
    held = layout.held_parameters(0)
    memory = [
        int(memory_bytes(parameters, 0, 0, setting.slots)) + copies
        for parameters, copies in zip(held, copied_bytes(layout), strict=True)
    ]
    hand_over = 2 if part == BLOCKS else 0  # to the worker that merges a block, and on to its next holders
    return Footprint(
        method, part, max(held), max(memory), found.sent[0], found.slowest, setting.local_steps,
        2 * (setting.workers - 1) + hand_over,
    )  # fmt: skip


def copied_bytes(layout: BlockLayout) -> list[int]:
    """Bytes of the copies that each worker keeps in a round: for fewer bits on the wire, and for an outer optimizer."""
    plan = plan_sync(layout.partition(0), layout.partition(1))
    shared = [tensor for tensor in layout.shared.values() if has_outer_step(tensor)]
    together = [*shared, *parameters_of([layout.blocks[block] for block in plan.averaged])]
    averaged, outer = sum(map(outer_bytes, together)), layout.config.outer != "none"
    wire = WIRE_FORMATS[layout.config.wire]
    compressed = sum(outer_bytes(tensor) for tensor in together if wire is not None and compressible(tensor))
    # Rounding errors of matrices, in 32 bits as the parameters are.
    matrices = [tensor for tensor in together if compressible(tensor) and not is_vector(tensor)]
    taken = sum(map(outer_bytes, matrices)) if wire is not None and wire.feedback and not outer else 0
    found = []
    for worker in range(layout.workers):
        owned = [layout.blocks[block] for block, owner in plan.owner.items() if owner == worker]
        merged = sum(map(outer_bytes, parameters_of(owned)))
        # The values at the beginning of the round are kept once for both, of averaged tensors.
        began = averaged if outer else compressed
        found.append(began + taken + (averaged + 2 * merged if outer else 0))
    return found


def _of_neurons(layout: NeuronLayout, setting: Setting) -> Footprint:
    states = OptimizerStates([torch.optim.SGD(layout.module.parameters(), lr=0.01)])
    sent = [neuron_bytes(layout, states, number) for number in range(ROUNDS)]
    held = max(layout.held_parameters(0))
    store = neuron_memory.closed_form({"workers": layout.workers, **neuron_memory.sizes(layout)})["store"]
    memory = int(memory_bytes(held, 0, 0, setting.slots) + store)
    messages = 2 * (setting.workers - 1) + 1
    return Footprint(
        "ist", NEURONS, held, memory, mean(map(mean, sent)), mean(map(max, sent)), setting.local_steps, messages
    )


def operations(module: nn.Module, example: Tensor) -> int:
    """Floating-point operations of a forward pass of the held part."""
    with _evaluating(module):
        return count_flops(module, (), lambda: module(example))[""]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _in_blocks(module: nn.Module, example: Tensor, setting: Setting) -> Part:
    options: dict[str, Any] = {"min_blocks": setting.min_blocks}
    if example.is_meta:
        layout = BlockLayout(module, Config(**options), setting.workers)
    else:
        layout = inspect_model(module, workers=setting.workers, example=(example,), **options).layout
    if not layout.partial:
        raise ValueError(
            f"min_blocks={layout.schedule.min_blocks} gives every worker all {len(layout.blocks)} blocks; set min_blocks=0"
        )
    held = layout.held_parameters(0)
    most = layout.partition(0).held[held.index(max(held))]
    return Part(module, layout, lambda: Subnet(layout.blocks).hold(most))


def _in_neurons(module: nn.Module, example: Tensor, setting: Setting) -> Part:
    if setting.workers < 2:
        raise ValueError("one worker holds all neurons")
    layout = NeuronLayout(module, NeuronConfig(local_steps=setting.local_steps), setting.workers)
    held = layout.held_parameters(0)

    def hold() -> None:
        NeuronSubnet(layout, held.index(max(held))).hold(0)
        # It has memory without values now; numbers near 0 would be slow.
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)

    return Part(module, layout, hold)

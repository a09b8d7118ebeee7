"""The costs of a partition of residual blocks before anything trains: blocks, memory, messages and computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resist_lightning.methods.residual import Block, BranchEnd, find_blocks, parameters_of
from resist_lightning.methods.resist.bytes import observation_bytes, sync_bytes
from resist_lightning.methods.resist.config import default_min_blocks
from resist_lightning.methods.resist.folding import foldable
from resist_lightning.methods.resist.network import default_choices, names_chosen
from resist_lightning.methods.resist.observed import observed
from resist_lightning.methods.resist.short_globs import short_globs
from resist_lightning.methods.resist.structure import repeated_blocks
from resist_lightning.schedule.partition import blocks_per_worker
from resist_lightning.state.optimizer_state import OptimizerStates

if TYPE_CHECKING:  # it imports this module
    from resist_lightning.methods.resist.layout import BlockLayout

ROUNDS = 8
"""Rounds after the warm-up over which means are taken; partitions are drawn anew in each."""

_OTHER_CHOICES = ("the paper's rule", "all sections, without the first block of each", "all that keep the shape")

Flops = Mapping[str, int]
"""Floating-point operations of a forward in each block, by name, and of the whole network under an empty name."""


@dataclass(frozen=True)
class Row:
    """Blocks of one class in one container that are treated alike.

    Args:
        globs: choose exactly these blocks; their names where they cannot be chosen.
        kind: name of their class.
        blocks: number of blocks.
        bytes: bytes of their parameters.
        keeps_shape: whether their output has the shape of their input.
        chosen: whether they are partitioned.
        folds: whether the test-time scale folds into their weights; None before a forward has shown it.
        ends: layers, or tensors, into which it folds.
        flops: share of the network's operations in a forward; None if it is not known.
    """

    globs: tuple[str, ...]
    kind: str
    blocks: int
    bytes: int
    keeps_shape: bool
    chosen: bool
    folds: bool | None
    ends: tuple[str, ...]
    flops: float | None


@dataclass(frozen=True)
class Costs:
    """Costs of a worker in memory, messages and computing, as means over workers and rounds.

    Args:
        parameters: number of parameters of the network.
        held: parameters that a worker holds: the mean, the least and the most.
        sent: bytes that a worker sends per sync: the mean, the least and the most; without optimizer state.
        slowest: bytes per sync of the worker that sends the most in it and delays the others, as a mean over rounds.
        local_sgd: bytes per sync of a worker if nothing was partitioned and compressed.
        computed: share of the forward's operations that a worker does; None if it is not known.
        evaluation: bytes that it sends for an evaluation in the middle of a round, as a mean, if all workers
            evaluate and if the first does.
        evaluate_on: the setting that decides between the two.
    """

    parameters: int
    held: tuple[float, int, int]
    sent: tuple[float, int, int]
    slowest: float
    local_sgd: int
    computed: float | None
    evaluation: tuple[float, float]
    evaluate_on: str


@dataclass(frozen=True)
class Alternative:
    """Another choice of blocks.

    Args:
        rule: the rule of the choice, in words.
        globs: value of the option ``blocks``.
        blocks: number of blocks.
        held: mean share of the parameters that a worker would hold.
    """

    rule: str
    globs: tuple[str, ...]
    blocks: int
    held: float


def rows(layout: BlockLayout, flops: Flops | None = None) -> list[Row]:
    """The rows for a network: one for each section, class and kind of treatment of its blocks, in its order."""
    chosen = {block.name: block for block in layout.blocks}
    keeping = {block.name for block in repeated_blocks(layout.module)} | set(chosen)
    groups: dict[Any, list[Block]] = {}
    for block in all_blocks(layout):
        keeps = block.keeps_shape or block.name in keeping
        key = (block.section, type(block.module).__name__, keeps, block.name in chosen, _ends(block))
        groups.setdefault(key, []).append(block)
    table = []
    for (_, kind, keeps, is_chosen, (folds, ends)), blocks in groups.items():
        names = [block.name for block in blocks]
        table.append(
            Row(
                globs=_globs(layout, names) if keeps else tuple(names),
                kind=kind,
                blocks=len(blocks),
                bytes=sum(parameter.nbytes for parameter in parameters_of(blocks)),
                keeps_shape=keeps,
                chosen=is_chosen,
                folds=folds,
                ends=ends,
                flops=None if flops is None else sum(flops[name] for name in names) / max(flops[""], 1),
            )
        )
    return table


def costs(layout: BlockLayout, flops: Flops | None = None) -> Costs:
    """The costs of a worker in the first rounds after the warm-up."""
    first = layout.config.warmup_rounds
    states, fragments = OptimizerStates([]), layout.config.fragments
    sizes = {fragment: layout.sizes(states, fragment) for fragment in (None, *range(fragments))}
    held: list[int] = []
    sent: list[int] = []
    slowest: list[int] = []
    absent: list[int] = []
    evaluation: tuple[list[int], list[int]] = ([], [])
    parts = observed(layout)
    for round in range(first, first + ROUNDS * fragments):
        partition = layout.partition(round)
        held += layout.held_parameters(round)
        plan = layout.schedule.plan(round)
        following = layout.schedule.coming_plan(plan.fragment, round + 1)
        in_sync = sync_bytes(plan, sizes[plan.fragment], layout.workers, following)
        by_worker = [sum(kinds.values()) for kinds in in_sync]
        sent += by_worker
        slowest.append(max(by_worker))
        observed_plan = layout.schedule.whole_plan(round)
        for at_first in (False, True):
            evaluation[at_first].extend(
                observation_bytes(observed_plan, parts, layout.workers, unequal=True, at_first=at_first)
            )
        if flops is not None:
            computed = [sum(flops[layout.blocks[index].name] for index in indices) for indices in partition.held]
            everything = sum(flops[block.name] for block in layout.blocks)
            absent += [everything - operations for operations in computed]
    return Costs(
        parameters=sum(parameter.numel() for parameter in layout.module.parameters()),
        held=(_mean(held), min(held), max(held)),
        sent=(_mean(sent), min(sent), max(sent)),
        slowest=_mean(slowest),
        local_sgd=layout.local_sgd_bytes(1) // fragments,
        computed=None if flops is None else 1 - _mean(absent) / max(flops[""], 1),
        evaluation=(_mean(evaluation[0]), _mean(evaluation[1])),
        evaluate_on=layout.config.evaluate_on,
    )


def alternatives(layout: BlockLayout) -> list[Alternative]:
    """The other choices that the default is taken from, each once."""
    seen = [{block.name for block in layout.blocks}]
    found = []
    for rule, blocks in zip(_OTHER_CHOICES, default_choices(layout.module, layout.trained), strict=True):
        names = [block.name for block in blocks]
        if names and set(names) not in seen:
            seen.append(set(names))
            found.append(Alternative(rule, _globs(layout, names), len(names), _share_held(layout, blocks)))
    return found


def count_flops(module: nn.Module, blocks: Sequence[Block], call: Callable[[], Any]) -> Flops:
    """Count the operations of matrix products, convolutions and attention in a forward.

    Args:
        module: the network.
        blocks: blocks of it.
        call: function that runs its forward.
    """
    counter = FlopCounterMode(display=False)
    flops = dict.fromkeys([block.name for block in blocks], 0)

    def begin(name: str, *_: Any) -> None:
        flops[name] -= counter.get_total_flops()

    def end(name: str, *_: Any) -> None:
        flops[name] += counter.get_total_flops()

    handles = []
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(partial(begin, block.name)))
        handles.append(block.module.register_forward_hook(partial(end, block.name)))
    try:
        with counter, torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {**flops, "": counter.get_total_flops()}


def all_blocks(layout: BlockLayout) -> list[Block]:
    """The chosen blocks and all others that could be blocks and lie neither in nor around a chosen one."""
    found = {block.name: block for block in layout.blocks}
    for block in (*repeated_blocks(layout.module), *find_blocks(layout.module)):
        if not any(_nested(block.name, name) for name in found):
            found[block.name] = block
    order = {name: position for position, (name, _) in enumerate(layout.module.named_modules())}
    return sorted(found.values(), key=lambda block: order[block.name])


def _nested(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _ends(block: Block) -> tuple[bool | None, tuple[str, ...]]:
    """Whether the scale folds, and the layers or tensors into which it does."""
    if block.seen.ends:
        return True, tuple(_layer(end) for end in reversed(block.seen.ends))
    if foldable(block):
        return True, (str(block.branch_end),)
    folds = None if block.seen.ends is None else False  # None: no forward has shown it yet
    return folds, ()


def _layer(end: BranchEnd) -> str:
    """Name of the layer whose weight and bias end a branch, or of the tensor."""
    owner, _, name = end.tensors[0].rpartition(".")
    return owner if owner and name in ("weight", "bias") else end.tensors[0]


def _globs(layout: BlockLayout, names: Sequence[str]) -> tuple[str, ...]:
    return short_globs(names, lambda globs: names_chosen(layout.module, globs, layout.trained))


def _share_held(layout: BlockLayout, blocks: Sequence[Block]) -> float:
    """The mean share of the parameters that a worker holds if these blocks are dealt out."""
    config = layout.config
    least = default_min_blocks(len(blocks)) if config.min_blocks is None else min(config.min_blocks, len(blocks))
    counts = blocks_per_worker(len(blocks), layout.workers, least)
    total = sum(parameter.numel() for parameter in layout.module.parameters())
    inside = sum(parameter.numel() for parameter in parameters_of(blocks))
    # Over many rounds each block is held equally often.
    absent = 1 - sum(counts) / (layout.workers * len(blocks))
    return 1 - absent * inside / max(total, 1)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0

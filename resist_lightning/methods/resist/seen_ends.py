"""Shares the branch ends of blocks: with workers that have not run them, and with a resumed run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from resist_lightning.comm.collective import Collective
from resist_lightning.methods.residual import Block, BranchEnd
from resist_lightning.methods.resist.folding import foldable


def ends_of(blocks: Sequence[Block]) -> dict[str, Any]:
    """The ends of each block that is known, by its name, as plain data."""
    return {block.name: _plain(block) for block in blocks if block.seen.ends is not None}


def assume_ends(blocks: Sequence[Block], known: Mapping[str, Any]) -> None:
    """Take the ends of :func:`ends_of` from a checkpoint, until the first forward of each block has shown its own."""
    for block in blocks:
        ends = _made(known.get(block.name, ()))
        named = {f"{block.name}.{name}" for end in ends for name in (*end.tensors, *end.divided)}
        if block.name in known and named <= block.tensors().keys():  # the class may have changed since
            block.seen.ends, block.seen.assumed = ends, True


def agree_on_ends(blocks: Sequence[Block], collective: Collective) -> bool:
    """Share the ends that any worker has seen with all. Collective: every worker must call this, in the same order.

    Returns:
        Whether all is known that will ever be: every block has been seen, or needs not be.
    """
    own = {block.name: [_plain(block), block.seen.assumed] for block in blocks if block.seen.ends is not None}
    told = [json.loads(text) for text in collective.gather_bytes(json.dumps(own).encode())]
    for block in blocks:
        found = [ends[block.name] for ends in told if block.name in ends]
        seen = [ends for ends, assumed in found if not assumed]
        known = seen or [ends for ends, _ in found]
        if known:
            # Where workers have different findings, one could not run the block.
            best: list[Any] = next((ends for ends in known if ends), [])
            block.seen.ends, block.seen.assumed = _made(best), not seen
    all_known = all(foldable(block) or block.seen.ends is not None for block in blocks)
    return all_known and not any(block.seen.assumed for block in blocks)


def _plain(block: Block) -> list[Any]:
    return [[list(end.tensors), end.module, list(end.divided)] for end in block.seen.ends or ()]


def _made(ends: Sequence[Any]) -> tuple[BranchEnd, ...]:
    return tuple(BranchEnd(tuple(tensors), module, tuple(divided)) for tensors, module, divided in ends)

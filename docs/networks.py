"""Writes the table of docs/networks.md from trainings: python docs/networks.py [part of a network's name ...]."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch

from docs.table import rows_of, write_table
from resist_lightning import Config
from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.globs import summary
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.network import default_choices, share_of
from tests.helpers import zoo
from tests.helpers.zoo_run import WORKERS, Found, examine, held_shares

PAGE = Path(__file__).with_name("networks.md")
HEADER = (
    "| network | blocks by default | held | in full size | of which in blocks | folded | branches | plain - reported "
    "| = simulator | resumes |"
)
BRANCHES = 1e-3
"""Largest deviation of a scaled block from its reference, in relation to what the scale changes: of rounding, where a
branch is small beside its block's input."""
SENSITIVE = ("torchvision efficientnet_b0", "timm efficientnetv2")
"""Networks in which rounding errors grow a thousandfold in a few steps; the page says so."""
_DIFFERENCE = 7
"""The column that differs from machine to machine."""


def main(parts: list[str]) -> None:
    """Train the networks whose names contain one of some parts, or all, and write their rows."""
    known = rows()
    for name in zoo.NETWORKS:
        if not parts or any(part in name for part in parts):
            known[name] = row(name, examine(name))
            write(known)  # after each, as all take a while


def write(known: Mapping[str, str]) -> None:
    """Replace the table of the page by rows of networks."""
    write_table(PAGE, HEADER, [known[name] for name in zoo.NETWORKS if name in known])


def rows() -> dict[str, str]:
    """The rows of the page by network."""
    return rows_of(PAGE)


def row(name: str, found: Found) -> str:
    """The row of one network."""
    folded = len(found.blocks) - len(found.hooked)
    cells = [
        name,
        f"{len(found.blocks)}: {summary([block.removeprefix('net.') for block in found.blocks])}",
        f"{found.held:.0%}",
        *_in_full_size(name),
        f"{folded} of {len(found.blocks)}",
        "right" if found.branches < BRANCHES else f"{found.branches:.0e}",
        f"{found.difference:.0e}",
        "yes" if found.unlike < 1e-4 else f"{found.unlike:.0e}",
        "bit for bit" if found.resumed else "no",
    ]
    return f"| {' | '.join(cells)} |"


def same_row(one: str, other: str) -> bool:
    """Whether two rows say the same, but for the rounding error of the losses."""
    first, second = one.split(" | "), other.split(" | ")
    differences = [float(cells.pop(_DIFFERENCE)) for cells in (first, second)]
    return first == second and max(differences) < 1e-5


def _in_full_size(name: str) -> tuple[str, str]:
    """The share that a worker holds of the network in full size, and the share that could be partitioned."""
    build = zoo.NETWORKS[name].full
    if build is None:
        return "", ""
    try:
        with torch.device("meta"):
            network = build()
    except NotImplementedError:  # RegNet computes its widths with tensors
        network = build()
    try:
        held = held_shares(BlockLayout(network, Config(), WORKERS))
    except BlockSelectionError:
        return "refused", ""
    possible = max(share_of(network, blocks) for blocks in default_choices(network))
    return f"{fmean(held):.0%}, at most {max(held):.0%}", f"{possible:.0%}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])

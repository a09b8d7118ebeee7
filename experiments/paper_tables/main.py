"""From settings to tables, result file, picture and page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.app.launch import readable_errors
from experiments.harness.record import read_record, write_record
from experiments.harness.tables import main as write_tables
from experiments.paper_tables import tables
from experiments.paper_tables.figure import draw
from experiments.paper_tables.memory import Group, measure_group
from experiments.paper_tables.networks import SLOTS, WORKERS, measure, networks
from experiments.paper_tables.settings import RESULTS, parse
from experiments.paper_tables.volumes import all_volumes

WIDTHS = {"full": 1.0, "smoke": 1 / 16}
WIDE = 160
"""Characters in a line of a file or pipe, which has no width of its own."""


def main(arguments: Sequence[str], usage: str) -> None:
    """Run the program with these command-line arguments; ``usage`` is printed for ``--help``."""
    if {"-h", "--help"} & set(arguments):
        print(usage)
        return
    with readable_errors():
        cfg = parse(arguments)
    torch.set_num_threads(1)
    out = Path(cfg.out)
    try:
        content = gather(cfg)
    except KeyboardInterrupt:
        sys.exit("interrupted: the workers are ended, and nothing is written")
    path = write_record(out / "paper_tables.jsonl", content, torchvision=torchvision.__version__)
    content = read_record(path)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for make in tables.GRIDS.values():
        console.print(show(make(content)))
    print(f"wrote {draw(out / 'gb_per_round.png', content)}")
    if out.resolve() == RESULTS:
        write_tables()


def gather(cfg: DictConfig) -> dict[str, Any]:
    """Everything that goes into the result file, but for the machine."""
    measured = [measure_group(Group(workers, WIDTHS[cfg.size])) for workers in cfg.processes]  # forks: it must be first
    return {
        "settings": {"size": cfg.size, "rounds": cfg.rounds, "processes": list(cfg.processes)},
        "workers": list(WORKERS),
        "optimizer_slots": SLOTS,
        "volumes": all_volumes(cfg.rounds),
        "networks": [measure(network) for network in networks(cfg.size)],
        "measured": measured,
    }


def show(grid: tables.Grid) -> Table:
    """The grid on the screen."""
    table = Table(*grid.header, title=grid.title, title_justify="left", title_style="bold")
    for row in grid.rows:
        table.add_row(*row)
    return table

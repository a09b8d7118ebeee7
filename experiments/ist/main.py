"""From the command line to result files, tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.accuracy.pool import each
from experiments.app.launch import readable_errors
from experiments.harness.record import read_record, write_record
from experiments.harness.study import Study
from experiments.harness.tables import main as write_tables
from experiments.ist import tables
from experiments.ist.cases import cases
from experiments.ist.figure import draw_all
from experiments.ist.memory import Group, measure_group
from experiments.ist.settings import RESULTS, parse, recorded
from experiments.ist.shapes import Shape, measure_shape
from experiments.ist.training import measure
from experiments.paper_tables.tables import Grid

WIDE = 170
"""Characters in a line of a file or pipe, which has no width of its own."""


def main(arguments: Sequence[str], usage: str) -> None:
    """Run the program with these command-line arguments; ``usage`` is printed for ``--help``."""
    if {"-h", "--help"} & set(arguments):
        print(usage)
        return
    with readable_errors():
        names, cfg = parse(arguments)
        torch.set_num_threads(1)
        try:
            for name in sorted(names, key=list(RUNS).index):
                RUNS[name](cfg)
        except KeyboardInterrupt:
            sys.exit("interrupted: trainings that were measured are kept; the same command goes on from there")
    out = Path(cfg.out)
    for name in names:
        show(tables.grids(name, read_record(out / f"{name}.jsonl")))
    for path in draw_all(out):
        print(f"wrote {path}")
    if out.resolve() == RESULTS:
        write_tables()


def show(grids: Sequence[Grid]) -> None:
    """Print tables."""
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for grid in grids:
        table = Table(*grid.header, title=grid.title, title_justify="left", title_style="bold")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def run_accuracy(cfg: DictConfig) -> None:
    """Train what is missing."""
    study = Study.at(Path(cfg.out) / "accuracy.jsonl", recorded(cfg), fresh=cfg.fresh)
    missing = [case for case in cases(cfg) if study.row_of(case) is None]
    work = partial(measure, size=cfg.size, passes=cfg.passes)
    for number, (case, found) in enumerate(each(missing, work, cfg.jobs), start=1):
        study.add(case, found)
        print(f"{number}/{len(missing)} {case.name}: {found['last']:.2f} % in {found['seconds']:.0f} s", flush=True)


def run_memory(cfg: DictConfig) -> None:
    """Groups of real workers, one after the other."""
    groups = [
        measure_group(Group(workers, width, cfg.inputs)) for width in cfg.widths for workers in cfg.memory_workers
    ]
    write_record(Path(cfg.out) / "memory.jsonl", {"settings": {"inputs": cfg.inputs}, "groups": groups})


def run_shapes(cfg: DictConfig) -> None:
    """The paper's networks, or those of a sample."""
    rows = [measure_shape(Shape(cfg.inputs, width), cfg.rounds, cfg.steps) for width in cfg.widths]
    settings = {"inputs": cfg.inputs, "rounds": cfg.rounds, "steps": cfg.steps}
    write_record(Path(cfg.out) / "shapes.jsonl", {"settings": settings, "rows": rows})


RUNS: dict[str, Callable[[DictConfig], None]] = {"memory": run_memory, "shapes": run_shapes, "accuracy": run_accuracy}
"""In this order: memory forks, so that it must be first."""

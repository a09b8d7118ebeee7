"""From the command line to result files, tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.app.launch import readable_errors
from experiments.auxnet import tables
from experiments.auxnet.cases import accuracy_cases, link_cases, sweep_cases, timing_cases
from experiments.auxnet.figure import draw_all
from experiments.auxnet.links import over_links
from experiments.auxnet.settings import RESULTS, parse, recorded
from experiments.auxnet.training import measure
from experiments.harness.study import Study
from experiments.harness.tables import main as write_tables
from experiments.ist.main import show


def main(arguments: Sequence[str], usage: str) -> None:
    """Run the program with these command-line arguments; ``usage`` is printed for ``--help``."""
    if {"-h", "--help"} & set(arguments):
        print(usage)
        return
    with readable_errors():
        names, cfg = parse(arguments)
        torch.set_num_threads(1)
        try:
            for name in names:
                run(name, cfg)
        except KeyboardInterrupt:
            sys.exit("interrupted: trainings that were measured are kept; the same command goes on from there")
    out = Path(cfg.out)
    for name in names:
        content = tables.read(name, out)
        show(tables.grids(name, content) if content else [])
    for path in draw_all(out):
        print(f"wrote {path}")
    if out.resolve() == RESULTS:
        write_tables()


def run(name: str, cfg: DictConfig) -> None:
    """Measure what is missing of a study, one training after the other: each may need both cores."""
    study = Study.at(Path(cfg.out) / f"{name}.jsonl", recorded(cfg, name), fresh=cfg.fresh)
    missing = [case for case in CASES[name](cfg) if study.row_of(case) is None]
    if name == "links" and missing:
        with over_links(cfg) as (work, possible):
            _add(study, [case for case in missing if case.bandwidth_gbit in possible], work)
    else:
        _add(study, missing, partial(measure, cfg=cfg, steps=cfg.steps if name == "timing" else None))


def _add(study: Study, missing: Sequence[Any], work: Callable[[Any], dict[str, Any]]) -> None:
    for number, case in enumerate(missing, start=1):
        found = work(case)
        if study.path.stem != "timing" or any(
            row["timeline"] for row in study.rows if row["case"]["task"] == case.task
        ):
            found["timeline"] = None  # the picture shows one step of each network, and a timeline is long
        study.add(case, found)
        print(
            f"{study.path.stem} {number}/{len(missing)} {case.name}: {_ended(found)}, {found['seconds']:.0f} s",
            flush=True,
        )


def _ended(found: dict[str, Any]) -> str:
    if found.get("diverged"):
        return "diverged"
    what = f"{found['last']:.2f} %, " if "last" in found else ""
    return f"{what}{1000 * found['step_seconds']:.1f} ms per step"


CASES: dict[str, Callable[[DictConfig], Sequence[Any]]] = {
    "accuracy": accuracy_cases,
    "sweep": sweep_cases,
    "timing": timing_cases,
    "links": link_cases,
}

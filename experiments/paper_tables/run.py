"""The paper's own accounting, from our planner and networks: Table 1, parameters, MACs and memory per worker.

python experiments/paper_tables/run.py
python experiments/paper_tables/run.py size=smoke out=FOLDER

Options are key=value: see `Options`. Prints tables and writes paper_tables.jsonl and gb_per_round.png; the full size into
experiments/paper_tables/results, and its tables into README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision

from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show_and_write
from experiments.paper_tables import tables
from experiments.paper_tables.figure import draw
from experiments.paper_tables.memory import Group, measure_group
from experiments.paper_tables.networks import WORKERS, measure, networks
from experiments.paper_tables.volumes import all_volumes

WIDTHS = {"full": 1.0, "smoke": 1 / 16}


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/paper_tables")
    rounds: int = option(200, "plans over which bytes are averaged; 10 give an estimate", least=1, smoke=10)
    processes: list[int] = option(
        [2, 4, 8],
        "numbers of real workers whose memory is measured; [] for none",
        least=2,
        most=8,
        empty=True,
        smoke=[4],
    )


def run(_: Sequence[str], options: Options) -> None:
    """Compute, measure, write."""
    torch.set_num_threads(1)
    out = Path(options.out)
    width = WIDTHS[options.size]
    measured = [measure_group(Group(workers, width)) for workers in options.processes]  # forks: it must be first
    content = {
        "settings": options.take("size", "rounds", "processes"),
        "workers": list(WORKERS),
        "volumes": all_volumes(options.rounds),
        "networks": [measure(network) for network in networks(options.size)],
        "measured": measured,
    }
    write_record(out / "paper_tables.jsonl", content, torchvision=torchvision.__version__)
    show_and_write(out, tables.RESULTS, tables.STUDIES, ["paper_tables"], [draw(out / "gb_per_round.png", content)])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))

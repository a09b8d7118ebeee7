"""IST against local SGD, DDP and one process: accuracy on equal samples, memory, and bytes of the paper's networks.

python experiments/ist/run.py                                (all studies; about an hour on two cores)
python experiments/ist/run.py accuracy tasks=[digits]        (some of them, some of it)
python experiments/ist/run.py size=smoke out=FOLDER          (seconds)

Studies: accuracy, memory, shapes. Options are key=value: see `Options`. Prints tables, and writes a result file for each
study and pictures; the full size into experiments/ist/results, and its tables into README.md. A training that was measured
is not measured again, unless fresh=true. Times over real links are measured by experiments/links/run.py and
experiments/time_to_accuracy/run.py with size=ist.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.study import Study
from experiments.harness.tables import show_and_write
from experiments.ist import tables
from experiments.ist.cases import LENGTHS, RATES, TASKS, cases
from experiments.ist.figure import draw_all
from experiments.ist.memory import Group, measure_group
from experiments.ist.shapes import Shape, measure_shape
from experiments.ist.training import measure

STUDIES = ("memory", "shapes", "accuracy")  # in this order: memory forks, so that it must be first


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result files", smoke="runs/ist")
    jobs: int = option(
        2, "trainings of the accuracy study that run at a time, one core each", least=1, most=64, smoke=1
    )
    fresh: bool = option(False, "true measures existing results again")
    tasks: list[str] = option(list(TASKS), choices=TASKS)
    seeds: int = option(3, "3 or more show the spread", least=1, most=100, smoke=1)
    ablation_seeds: int = option(3, "seeds of trainings that are only in ablations", least=1, most=100, smoke=1)
    workers: list[int] = option([2, 4, 8], "these divide the samples equally", choices=(2, 4, 8), smoke=[2, 4])
    lengths: list[int] = option(list(LENGTHS), "local steps per round, in the ablation", least=1, smoke=[5, 20])
    rates: list[float] = option(list(RATES), "learning rates that are compared", above=0, smoke=[0.1])
    passes: int | None = option(
        None, "passes over the training examples, of all workers; null: the task's default", least=1
    )
    widths: list[int] = option([4096, 8192], "neurons of a hidden layer", least=1, smoke=[64])
    memory_workers: list[int] = option(
        [1, 2, 4, 8], "numbers of workers whose memory is measured", least=1, smoke=[1, 2]
    )
    inputs: int = option(4096, "inputs of the networks whose memory and speed are measured", least=1, smoke=32)
    rounds: int = option(20, "rounds over which bytes are averaged", least=1, smoke=2)
    steps: int = option(9, "timed local steps", least=1, smoke=2)

    def __post_init__(self) -> None:
        most = max(self.memory_workers)
        if min(self.widths) < most:
            raise ConfigError(f"widths={self.widths}: must be at least {most}, a neuron for each of memory_workers")


def run(names: Sequence[str], options: Options) -> None:
    """Measure the missing cases of these studies, then show tables and draw the pictures."""
    out = Path(options.out)
    torch.set_num_threads(1)
    if "memory" in names:
        shapes = product(options.widths, options.memory_workers)
        groups = [measure_group(Group(workers, width, options.inputs)) for width, workers in shapes]
        write_record(out / "memory.jsonl", {"settings": options.take("inputs"), "groups": groups})
    if "shapes" in names:
        rows = [measure_shape(Shape(options.inputs, width), options.rounds, options.steps) for width in options.widths]
        write_record(out / "shapes.jsonl", {"settings": options.take("inputs", "rounds", "steps"), "rows": rows})
    if "accuracy" in names:
        study = Study.at(out / "accuracy.jsonl", options.take("size", "passes"), fresh=options.fresh)
        work = partial(measure, size=options.size, passes=options.passes)
        study.fill(cases(options), work, lambda row: f"{row['last']:.2f} % in {row['seconds']:.0f} s", options.jobs)
    show_and_write(out, tables.RESULTS, tables.STUDIES, names, draw_all(out))


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__, STUDIES))

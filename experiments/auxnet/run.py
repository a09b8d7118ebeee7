"""AuxNet against back-propagation in one process and against torch's own pipeline: accuracy, seconds, memory, bytes.

python experiments/auxnet/run.py folder=PATH                     (all studies; PATH: train/<class>/*, test/<class>/*)
python experiments/auxnet/run.py accuracy tasks=[digits]         (some of them, some of it)
python experiments/auxnet/run.py accuracy tasks=[cifar_all] methods=[serial,delayed-warm] folder=PATH    (hours)
python experiments/auxnet/run.py size=smoke out=FOLDER           (seconds)

Studies: accuracy, sweep, timing, links. Options are key=value: see `Options`. Every method trains in real processes of
one thread each, on the same images in the same order, in the same loop; nothing else should run on the machine, as all
of it is timed. Only accuracies of late gradients come from the reference simulator. Prints tables, and writes a result
file for each study and pictures; the full size into experiments/auxnet/results, and its tables into README.md. A
training that was measured is not measured again, unless fresh=true. Links need root and iproute2: without, they are
unshaped only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from experiments.auxnet import tables
from experiments.auxnet.cases import ALL, LATE, SHORT_TASKS, STUDIES, TASKS, TIMED
from experiments.auxnet.figure import draw_all
from experiments.auxnet.links import over_links
from experiments.auxnet.training import measure, simulate
from experiments.harness import cli
from experiments.harness.settings import ConfigError, option
from experiments.harness.study import Study
from experiments.harness.tables import Row, show_and_write
from experiments.links.rig import UNSHAPED, check_bandwidths

METHODS = ("serial", "penalty", "al-net", "hybrid", "delayed", "delayed-warm", "penalty-store", "al-store", "pipeline")
# Options that the results of a study depend on, besides their cases.
RECORDED = {
    "accuracy": ("epochs", "evaluations"), "sweep": ("epochs", "evaluations"), "timing": ("steps",), "links": ("link_steps",),
}  # fmt: skip


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result files", smoke="runs/auxnet")
    fresh: bool = option(False, "true measures existing results again")
    folder: str | None = option(None, "folder=PATH with train/<class>/* and test/<class>/*, for the tasks cifar_*")
    cache_dir: str = option("runs/cache", "folder for decoded images")
    tasks: list[str] = option(SHORT_TASKS, choices=TASKS, smoke=["digits"])
    methods: list[str] = option(list(METHODS), choices=METHODS)
    workers: list[int] = option([1, 2, 3], "tasks have cuts for up to 3 workers", least=1, most=3, smoke=[1, 2])
    seeds: int = option(3, "3 or more show the spread", least=1, most=100, smoke=1)
    epochs: int | None = option(None, "passes over the training images; null: the task's default", least=1)
    evaluations: int = option(4, "evaluations per training, evenly spaced", least=1, smoke=2)
    micro_batches: int = option(4, "micro-batches per step of the pipeline; must divide the batch", least=2, smoke=2)
    schedule: str = option("gpipe", "schedule of the pipeline", choices=("gpipe", "1f1b"))
    sweep_tasks: list[str] = option(["digits", "cifar_deep"], choices=TASKS, smoke=["digits"])
    betas: list[float] = option([0.1, 1.0, 10.0, 100.0], "weights of the penalty", above=0, smoke=[0.1, 1.0])
    aux_widths: list[int] = option([16, 32, 64], "channels of the auxiliary networks", least=1, smoke=[4])
    aux_rates: list[float] = option([0.03, 0.1, 0.3], "learning rates of the auxiliary networks", above=0, smoke=[0.1])
    warmups: list[int] = option([0, 50, 200], "steps of warm-up", least=0, smoke=[2])
    serial_every: list[int] = option([2, 4, 8], "every such step is serial", least=1, smoke=[2])
    lambda_steps: list[float] = option([0.1, 0.3, 1.0], "step sizes of the guesses", above=0, most=1, smoke=[0.5])
    networks: list[str] = option(list(TIMED), choices=TIMED, smoke=["resnet_38"])
    steps: int = option(30, "steps of a training that is only timed; the first third is not counted", least=4, smoke=6)
    repeats: int = option(3, "trainings of each kind that are timed, interleaved", least=1, smoke=1)
    link_networks: list[str] = option(["resnet_38", "wrn_16_4"], choices=TIMED, smoke=["resnet_38"])
    link_steps: int = option(12, "steps of a training over a link; the first third is not counted", least=4, smoke=9)
    bandwidths_gbit: list[Any] = option([0.1, 1, UNSHAPED], smoke=[0.001, UNSHAPED])

    def __post_init__(self) -> None:
        check_bandwidths(self.bandwidths_gbit)
        if self.schedule == "1f1b" and "pipeline" in self.methods and max(self.workers) > self.micro_batches:
            raise ConfigError(
                f"micro_batches={self.micro_batches}: schedule=1f1b needs as many micro-batches as workers, "
                f"{max(self.workers)}; increase it, or set schedule=gpipe"
            )
        for name in dict.fromkeys([*self.tasks, *self.networks, *self.link_networks]):
            batch = ALL[name].scales[self.size].batch
            if "pipeline" in self.methods and batch % self.micro_batches:
                raise ConfigError(
                    f"micro_batches={self.micro_batches}: {name} has batches of {batch}, which must be a multiple of "
                    "it, so that the mean over micro-batches equals the mean over the batch"
                )


def run(names: Sequence[str], options: Options) -> None:
    """Measure the missing cases of these studies, one training after the other: each may need both cores."""
    _check_folder(names, options)
    torch.set_num_threads(1)
    out = Path(options.out)
    for name in names:
        study = Study.at(out / f"{name}.jsonl", options.take("size", *RECORDED[name]), fresh=options.fresh)
        wanted = STUDIES[name](options)
        if name == "links" and study.missing(wanted):
            with over_links(options) as (work, possible):
                study.fill(
                    [case for case in wanted if case.bandwidth_gbit in possible], partial(_kept, study, work), _ended
                )
        else:
            work = partial(_measure_or_simulate, options=options, steps=options.steps if name == "timing" else None)
            study.fill(wanted, partial(_kept, study, work), _ended)
    show_and_write(out, tables.RESULTS, tables.STUDIES, names, draw_all(out))


def _check_folder(names: Sequence[str], options: Options) -> None:
    used = [*(options.tasks if "accuracy" in names else []), *(options.sweep_tasks if "sweep" in names else [])]
    wanting = [name for name in used if TASKS[name].images == "folder"]
    if wanting and (options.folder is None or not Path(options.folder).is_dir()):
        raise ConfigError(
            f"folder={options.folder}: {wanting[0]} needs a folder with train/<class>/* and test/<class>/*; give "
            "folder=PATH, or take tasks=[digits] sweep_tasks=[digits]"
        )


def _measure_or_simulate(case: Any, options: Options, steps: int | None) -> Row:
    """Measure in processes; accuracies of late gradients by the simulator, which equals them bit for bit."""
    return simulate(case, options) if steps is None and case.method in LATE else measure(case, options, steps=steps)


def _kept(study: Study, work: Any, case: Any) -> Row:
    """A row; its timeline is long and kept only for the first of each network, as the picture shows one step."""
    found = work(case)
    if study.path.stem != "timing" or any(row["timeline"] for row in study.rows if row["case"]["task"] == case.task):
        found["timeline"] = None
    return found


def _ended(found: Row) -> str:
    if found.get("diverged"):
        return "diverged"
    what = f"{found['last']:.2f} %, " if "last" in found else ""
    if "step_seconds" in found:
        what += f"{1000 * found['step_seconds']:.1f} ms per step, "
    return f"{what}{found['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__, list(STUDIES)))

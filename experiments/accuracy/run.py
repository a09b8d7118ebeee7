"""Accuracy on equal samples: one process, DDP, local SGD and ResIST with 2, 4 and 8 workers; and the paper's ablations.

python experiments/accuracy/run.py folder=PATH                 (all studies; torchvision downloads CIFAR-10 to PATH)
python experiments/accuracy/run.py main check folder=PATH      (some of them)
python experiments/accuracy/run.py size=jpeg folder=PATH       (a JPEG copy: PATH has train/<class>/*, test/<class>/*)
python experiments/accuracy/run.py size=quarter folder=PATH    (the same, a quarter of the paper's width, an earlier recipe)
python experiments/accuracy/run.py size=short folder=PATH      (the same, minutes a training, images of 16 x 16 pixels)
python experiments/accuracy/run.py size=smoke out=/tmp/smoke   (seconds, on digits)

Studies: main check design local_steps momentum batch_norm scale wire overlap outer optimizer own_rate rates. Options are key=value: see
`Options`. A result is written as soon as it is there (results/STUDY.jsonl); a second call resumes from there, fresh=true begins anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.accuracy import check, tables
from experiments.accuracy.cases import COUNTS, MOMENTA, STUDIES, WIRES, Case
from experiments.accuracy.figure import draw_all
from experiments.accuracy.training import measure, prepared
from experiments.harness import cli
from experiments.harness.settings import ConfigError, option
from experiments.harness.study import Study
from experiments.harness.tables import show_and_write
from experiments.trainers import LARGEST_WORKERS

NAMES = ["main", "check", *list(STUDIES)[1:]]  # the expensive one, which only chooses a learning rate, comes last
# Options that a result depends on, besides the case.
RECORDED = (
    "data", "samples", "batch", "eval_batch", "evaluations", "limit", "limit_test", "holdout", "shrink", "crop_padding", "width",
    "deep", "lr", "local_steps", "min_blocks", "check_samples", "schedule", "smoothing", "nesterov", "fast",
    "zero_branches",
)  # fmt: skip


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(
        str(tables.RESULTS), "folder of the result files",
        jpeg=str(tables.JPEG), quarter=str(tables.QUARTER), short=str(tables.SHORT),
    )  # fmt: skip
    data: str = option(
        "cifar10", "folder: any folder of images", choices=("folder", "cifar10", "digits"),
        jpeg="folder", quarter="folder", short="folder", smoke="digits",
    )  # fmt: skip
    folder: str | None = option(
        None, "folder=PATH of the files of CIFAR-10, or with train/<class>/* and test/<class>/*"
    )
    cache_dir: str = option("runs/cache", "folder for decoded images")
    jobs: int = option(2, "cases at a time, one core each", least=1, most=64, smoke=1)
    fresh: bool = option(False, "true measures existing results again")
    seeds: int = option(3, "3 as in the paper", least=1, most=100, smoke=1)
    ablation_seeds: int = option(2, "seeds of cases that are only in ablations", least=1, most=100, smoke=1)
    counts: list[int] = option(list(COUNTS), "numbers of workers", choices=COUNTS, smoke=[8, 2])
    samples: int = option(
        750_000, "training images that all workers of a case see together", least=1, short=61_440, smoke=192
    )
    batch: int = option(32, "images per local step of one worker", least=1, smoke=8)
    eval_batch: int = option(250, "images per evaluation step; matters to batch_norm=batch", least=1)
    evaluations: int = option(5, "evaluations per training, evenly spaced", least=1, short=8, smoke=2)
    limit: int | None = option(None, "training images per class, null for all", least=1, smoke=20)
    limit_test: int | None = option(None, "test images per class, null for all", least=1, short=500, smoke=5)
    holdout: float = option(0.04, "share of the training images", above=0, below=1, smoke=0.1)
    shrink: int = option(1, "2 averages squares of 2 x 2 pixels", least=1, most=4, short=2)
    crop_padding: int = option(2, "pixels by which a random crop moves an image at most", least=0, quarter=4, smoke=1)
    width: float = option(0.5, "1.0 is the paper's width", above=0, quarter=0.25, short=0.125, smoke=0.0625)
    deep: int = option(9, "blocks in section 3; all but the first are partitioned", least=3, most=64, smoke=3)
    lr: float = option(0.05, "highest learning rate", above=0, short=0.03, smoke=0.1)
    low_lr: float = option(0.025, "the lower learning rate, in the study own_rate", above=0, short=0.015)
    muon_lr: float = option(0.002, "highest learning rate of Muon, in the study optimizer", above=0)
    schedule: str = option("one_cycle", "schedule of the learning rate", choices=("one_cycle", "steps"), short="steps")
    smoothing: float = option(0.1, "label smoothing", least=0, below=1, short=0.0)
    nesterov: bool = option(True, "Nesterov momentum", short=False)
    fast: bool = option(True, "a batch norm before the pooling, bfloat16, channels last", short=False, smoke=False)
    zero_branches: bool = option(
        True, "with fast: residual branches begin at zero", quarter=False, short=False, smoke=False
    )
    local_steps: int = option(50, "local steps per round", least=1, short=25, smoke=2)
    min_blocks: int = option(2, "minimum blocks per worker", least=0)
    fragments: int = option(4, "fragments of the network, in the study overlap", least=2, smoke=2)
    check_samples: int = option(25_600, "images in the check against real processes", least=1, short=12_800, smoke=128)
    wires: list[str] = option(list(WIRES), "formats on the wire", choices=WIRES, smoke=["fp32", "int2"])
    outer_momenta: list[float] = option(list(MOMENTA), "of the outer step", least=0, below=1, smoke=[0.5, 0.9])
    lengths: list[int] = option([10, 25, 50, 100, 250, 500], "local steps per round", least=1, smoke=[2, 10])
    rates: list[float] = option([0.025, 0.05, 0.1, 0.2], "learning rates", above=0, smoke=[0.1])

    def __post_init__(self) -> None:
        if self.data != "digits" and self.folder is None:
            raise ConfigError(
                f"folder is missing: data={self.data} needs folder=PATH (folder: train/<class>/* and test/<class>/*; "
                "cifar10: the folder for torchvision's files), or set data=digits"
            )
        if self.data == "folder" and not Path(str(self.folder)).is_dir():
            raise ConfigError(f"folder={self.folder}: is not a folder; it must have train/<class>/* and test/<class>/*")
        if self.min_blocks > self.deep - 1:
            raise ConfigError(
                f"min_blocks={self.min_blocks}: deep={self.deep} has {self.deep - 1} blocks to partition; "
                f"set min_blocks={self.deep - 1} or less"
            )
        step = self.batch * LARGEST_WORKERS
        for key in ("samples", "check_samples"):
            value = getattr(self, key)
            if value < step:
                raise ConfigError(f"{key}={value}: must be at least batch x {LARGEST_WORKERS} = {step}; increase it")

    def __hash__(self) -> int:
        return hash(repr(self))


def opened(name: str, options: Options) -> Study:
    """A study with the rows measured so far."""
    return Study.at(Path(options.out) / f"{name}.jsonl", options.take(*RECORDED), fresh=options.fresh)


def run(names: Sequence[str], options: Options) -> None:
    """Measure the missing cases of these studies, then show tables and draw the pictures."""
    trained = [name for name in names if name != "check"]
    studies = {name: opened(name, options) for name in names}
    if "check" in names:  # forks: it must be first
        real = studies["check"]
        found = dict(check.compared(real.missing(check.cases(options)), options))
        real.fill(list(found), found.__getitem__, lambda row: f"largest difference {row['largest_difference']:.2g}")
    for name in trained:
        wanted = STUDIES[name](options)
        _copy_known(studies, name, wanted, options)
        if studies[name].missing(wanted):
            prepared(options)  # decodes a folder once, and refuses a bad one, before any process starts
        work = partial(measure, options=options)
        studies[name].fill(wanted, work, lambda row: f"{row['last']:.2f} % in {row['seconds']:.0f} s", options.jobs)
    out = Path(options.out)
    show_and_write(out, tables.RESULTS, tables.STUDIES, names, draw_all(out))


def _copy_known(studies: dict[str, Study], name: str, wanted: Sequence[Case], options: Options) -> None:
    """Copy rows that other studies have measured, so that a case of several studies is trained once."""
    for other in STUDIES:  # their files too, which may be of an earlier call
        try:
            source = studies.get(other) or (None if options.fresh else opened(other, options))
        except ConfigError:
            continue  # other settings: nothing to copy from there
        for case in studies[name].missing(wanted) if source else ():
            row = source.row_of(case)
            if row:
                studies[name].add(case, {key: value for key, value in row.items() if key != "case"})


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__, NAMES))

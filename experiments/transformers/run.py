"""Transformers on equal samples: one process, DDP, local SGD, DiLoCo and ResIST with 2 and 4 workers, under AdamW.

python experiments/transformers/run.py folder=PATH               (all studies; PATH: train/<class>/*, test/<class>/*)
python experiments/transformers/run.py rates language            (the language model, which needs no folder)
python experiments/transformers/run.py images data=cifar10 folder=PATH   (torchvision downloads CIFAR-10 to PATH)
python experiments/transformers/run.py size=long language        (eight times as many sequences: two minutes for each row)
python experiments/transformers/run.py size=smoke out=/tmp/smoke (seconds)

Studies: check rates language images. Options are key=value: see `Options`. A result is written as soon as it is there
(results/STUDY.jsonl); a second call resumes from there, fresh=true begins anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.harness import cli
from experiments.harness.settings import ConfigError, option
from experiments.harness.study import Study
from experiments.harness.tables import show_and_write
from experiments.trainers import LARGEST_WORKERS, steps_of
from experiments.transformers import check, tables
from experiments.transformers.cases import ALL_POLICIES, STUDIES
from experiments.transformers.text import digest
from experiments.transformers.training import measure, prepared

NAMES = ["check", "rates", "language", "images"]
# Options that a result depends on, besides the case.
COMMON = ("batch", "width", "depth", "heads", "local_steps")
TEXT = ("context", "evaluated", "text")
RECORDED = {
    "check": (*COMMON, *TEXT, "check_samples"),
    "rates": (*COMMON, *TEXT, "rate_samples"),
    "language": (*COMMON, *TEXT, "samples", "lr"),
    "images": (*COMMON, "data", "limit", "limit_test", "holdout", "image_samples", "image_lr"),
}


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result files", long=str(tables.LONG))
    data: str = option(
        "folder", "cifar10 is torchvision's download", choices=("folder", "cifar10", "digits"), smoke="digits"
    )
    folder: str | None = option(None, "folder=PATH with train/<class>/* and test/<class>/*")
    cache_dir: str = option("runs/cache", "folder for decoded images")
    jobs: int = option(1, "cases at a time, one core each", least=1, most=64)
    fresh: bool = option(False, "true measures existing results again")
    workers: list[int] = option([2, 4], "numbers of workers", least=2, most=LARGEST_WORKERS, smoke=[2])
    seeds: int = option(2, "number of seeds of the language model", least=1, most=100, smoke=1)
    image_seeds: int = option(1, "number of seeds of the ViT", least=1, most=100)
    policies: list[str] = option(
        ["reset", "keep", "travel"], "policies for Adam's state at a sync", choices=ALL_POLICIES, long=["keep"]
    )
    outer_momenta: list[float] = option(
        [0.65, 0.825, 0.9],
        "values besides the default, for the language model",
        least=0,
        below=1,
        empty=True,
        smoke=[0.9],
    )
    samples: int = option(6_144, "sequences that all workers of a case see together", least=1, long=49_152, smoke=128)
    image_samples: int = option(
        6_144, "images that all workers of a case see together", least=1, long=49_152, smoke=128
    )
    rate_samples: int = option(3_072, "sequences in the study of learning rates", least=1, smoke=64)
    check_samples: int = option(1_024, "sequences in the check against real processes", least=1, smoke=128)
    batch: int = option(4, "sequences or images per local step of one worker", least=1)
    context: int = option(64, "bytes per sequence", least=2, smoke=16)
    evaluated: int | None = option(1_024, "sequences per evaluation, null for all", least=1, smoke=16)
    width: int = option(64, "width of a token's vector", least=1, smoke=16)
    depth: int = option(5, "blocks; all but the first are partitioned", least=3, most=64, smoke=3)
    heads: int = option(2, "heads of each attention layer", least=1)
    local_steps: int = option(25, "local steps per round", least=1, smoke=3)
    lr: float = option(0.004, "highest learning rate of the language model", above=0)
    image_lr: float = option(0.001, "highest learning rate of the ViT", above=0, long=0.0005)
    rates: list[float] = option([0.002, 0.004, 0.008], "learning rates", above=0, smoke=[0.004])
    limit: int | None = option(None, "training images per class, null for all", least=1, smoke=20)
    limit_test: int | None = option(300, "test images per class, null for all", least=1, smoke=5)
    holdout: float = option(0.02, "share of the training images", above=0, below=1, smoke=0.1)
    # Further options that the images of the accuracy study need.
    shrink: ClassVar[int] = 1
    crop_padding: ClassVar[int] = 4
    eval_batch: ClassVar[int] = 250

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width={self.width}: must be a multiple of heads={self.heads}; change one of them")
        step = self.batch * LARGEST_WORKERS
        for key in ("samples", "image_samples", "rate_samples", "check_samples"):
            value = getattr(self, key)
            if value < step:
                raise ConfigError(f"{key}={value}: must be at least batch x {LARGEST_WORKERS} = {step}; increase it")
            if key != "check_samples" and steps_of(value, self.batch, max(self.workers)) < self.local_steps:
                raise ConfigError(
                    f"{key}={value}: {max(self.workers)} workers never sync in so few; increase it, or decrease "
                    f"local_steps={self.local_steps}"
                )

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def text(self) -> str:
        """A hash of the text: another Python has another one."""
        return digest()


def opened(name: str, options: Options) -> Study:
    """A study with the rows measured so far."""
    return Study.at(Path(options.out) / f"{name}.jsonl", options.take(*RECORDED[name]), fresh=options.fresh)


def run(names: Sequence[str], options: Options) -> None:
    """Measure the missing cases of these studies, then show the tables."""
    if "images" in names and options.data != "digits" and options.folder is None:
        raise ConfigError(
            f"folder is missing: data={options.data} needs folder=PATH for the study of images (folder: "
            "train/<class>/* and test/<class>/*; cifar10: the folder for torchvision's files); or choose the other "
            "studies"
        )
    studies = {name: opened(name, options) for name in names}
    if "check" in names:  # forks: it must be first
        real = studies["check"]
        found = dict(check.compared(real.missing(check.cases(options)), options))
        real.fill(list(found), found.__getitem__, lambda row: f"largest difference {row['largest_difference']:.2g}")
    for name in (name for name in names if name != "check"):
        wanted = STUDIES[name](options)
        missing = studies[name].missing(wanted)
        if missing:
            prepared(missing[0], options)  # decodes a folder once, and refuses a bad one, before any process starts
        unit = "%" if name == "images" else "bits per byte"
        work = partial(measure, options=options)
        studies[name].fill(
            wanted,
            work,
            lambda row, unit=unit: f"{row['test']:.4g} {unit} in {row['core_seconds']:.0f} s",
            options.jobs,
        )
    show_and_write(Path(options.out), tables.RESULTS, tables.STUDIES, names, [])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__, NAMES))

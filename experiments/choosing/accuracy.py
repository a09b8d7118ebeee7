"""Costs of the methods in accuracy, read from the result files of the accuracy studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from experiments.accuracy import tables as residual
from experiments.harness.tables import Content, Rows, chosen, read
from experiments.ist import tables as neurons
from experiments.ist.cases import TASKS
from resist_lightning.methods.ist.config import HALF

TITLES = {**residual.TITLES, "ist": "IST"}
BASELINES = ("single", "ddp")


@dataclass(frozen=True)
class Cost:
    """The cost of a method in accuracy, in one study."""

    points: float  # of test accuracy below DDP on equal samples; mean over seeds
    study: str  # in a word, for a cell
    workers: int  # with which it was measured
    seeds: int


@dataclass(frozen=True)
class Study:
    """Trainings of several methods on one data set."""

    name: str
    words: str  # data, network, samples
    rows: Rows

    @property
    def samples(self) -> int:
        """Training samples of every method."""
        return max(row["samples"] for row in self.rows)

    def costs(self, workers: int) -> dict[str, Cost]:
        """Costs by method, all measured with the same number of workers: costs of unequal numbers do not compare."""
        measured = self.measured_with(workers)
        found: dict[str, Cost] = {}
        if measured is None:
            return found
        for method in TITLES:
            points = [] if method in BASELINES else self._below_ddp(method, measured)
            if points:
                found[method] = Cost(mean(points), self.name, measured, len(points))
        return found

    def measured_with(self, workers: int) -> int | None:
        """The number of workers that stands for ``workers``: the same, the next larger one, or the largest."""
        counts = sorted({row["case"]["workers"] for row in self.rows if row["case"]["method"] not in BASELINES})
        return next((count for count in counts if count >= workers), counts[-1] if counts else None)

    def base(self, workers: int) -> int | None:
        """Number of workers of the DDP to compare with: the same, or the largest where that was not measured."""
        counts = {row["case"]["workers"] for row in chosen(self.rows, method="ddp")}
        return workers if workers in counts else max(counts, default=None)

    def _below_ddp(self, method: str, workers: int) -> list[float]:
        """Points of accuracy below DDP, for each seed that both have."""
        ddp = {row["case"]["seed"]: row["last"] for row in chosen(self.rows, method="ddp", workers=self.base(workers))}
        found = []
        for row in chosen(self.rows, method=method, workers=workers):
            seed = row["case"]["seed"]
            if seed in ddp:
                found.append(ddp[seed] - row["last"])
        return found


def residual_studies(folders: Sequence[Path] = ()) -> list[Study]:
    """Studies of residual networks: the full-size trainings, narrower ones, and short ones; or those of some folders."""
    names = {
        residual.RESULTS: "CIFAR-10",
        residual.QUARTER: "CIFAR-10, narrow",
        residual.SHORT: "CIFAR-10, short",
    }
    found = []
    for folder in folders or names:
        content = read(folder, "main")
        if content is not None:
            found.append(Study(names.get(folder, folder.name), _residual_words(content), content["rows"]))
    return found


def _residual_words(content: Content) -> str:
    settings = content["settings"]
    size = (8 if settings["data"] == "digits" else 32) // settings["shrink"]
    samples = max(row["samples"] for row in content["rows"])
    return (
        f"{residual.SETS[settings['data']]} at {size} x {size} pixels, a pre-activation network of (1, 1, {settings['deep']}, 1) "
        f"blocks at {settings['width']:g} of the paper's width, {samples:,} samples"
    )


def neuron_studies(folder: Path = neurons.RESULTS) -> list[Study]:
    """Studies of fully connected networks."""
    content = read(folder, "accuracy")
    if content is None:
        return []
    size, found = content["settings"]["size"], []
    for name, task in TASKS.items():
        rows = _by_default(content["rows"], name)
        if rows:
            samples = max(row["samples"] for row in rows)
            words = f"{task.title}; {task.depth} linear layers, hidden {task.width[size]}, {samples:,} samples"
            found.append(Study(name, words, rows))
    return found


def _by_default(rows: Rows, task: str) -> Rows:
    """The rows of a task, of IST with the default number of holders: one with two workers, half of all with more."""
    others = [row for row in neurons.usual(rows, task=task) if row["case"]["method"] != "ist"]
    two = neurons.usual(rows, task=task, method="ist", workers=2)
    several = neurons.usual(rows, task=task, method="ist", shares=str(HALF))
    return [*others, *two, *several]


def costs_of(studies: Sequence[Study], workers: int) -> dict[str, list[Cost]]:
    """Costs by method, in each study that has it."""
    found: dict[str, list[Cost]] = {}
    for study in studies:
        for method, cost in study.costs(workers).items():
            found.setdefault(method, []).append(cost)
    return found


def studies_for(*, neurons_only: bool, workers: int) -> list[Study]:
    """The most telling studies of a network: of fully connected ones, or of residual ones with as many workers.

    Of residual ones a study that measured as many workers, or more: one of the longest trainings, then one with this
    very number of workers, then the one that compares most methods with DDP.
    """
    if neurons_only:
        return neuron_studies()
    telling = [study for study in residual_studies() if study.costs(workers)]
    enough = [study for study in telling if (study.measured_with(workers) or 0) >= workers] or telling
    samples = max((study.samples for study in enough), default=0)
    longest = [study for study in enough if study.samples == samples]
    exact = [study for study in longest if study.measured_with(workers) == workers]
    # Of equal ones the first: full-size ones come first.
    return sorted(exact or longest, key=lambda study: -len(study.costs(workers)))[:1]

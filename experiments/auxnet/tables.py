"""The tables of AuxNet's experiments, from their result files: on the screen and in README.md (experiments/harness/tables.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.accuracy.tables import Rows, chosen, distinct, seeds, spread
from experiments.auxnet.cases import AUXNET, HYBRID, SWEEP_WORKERS, stored
from experiments.auxnet.link_tables import link_bytes, links
from experiments.auxnet.networks import layers
from experiments.auxnet.sweep_tables import aux_rates, betas, betas_of_others, hybrids, lambda_steps, warmups
from experiments.auxnet.tasks import ALL
from experiments.auxnet.timing_tables import seconds_of, speed_ups, timing
from experiments.auxnet.words import TITLES, title
from experiments.harness.record import read_if_made
from experiments.harness.words import bytes_in_words
from experiments.paper_tables.tables import Grid

RESULTS = Path(__file__).parent / "results"
NOT_YET = "Not measured yet.\n"

Content = dict[str, Any]


def kinds(rows: Rows) -> Iterator[tuple[str, str, int, bool, Rows]]:
    """Task, method, workers and augmentation, in the order of the tables, with their rows."""
    found = {tuple(row["case"][key] for key in ("task", "method", "workers", "augment")) for row in rows}
    tasks, methods = distinct(rows, "task"), list(TITLES)
    for task, method, workers, augment in sorted(
        found, key=lambda one: (tasks.index(one[0]), methods.index(one[1]), one[2], not one[3])
    ):
        yield task, method, workers, augment, chosen(
            rows, task=task, method=method, workers=workers, augment=augment
        )  # fmt: skip


def accuracy(content: Content) -> Grid:
    """Against one process with the same seeds and augmentation, the fair baseline of a method that must do without."""
    lines = []
    for task, method, workers, augment, own in kinds(content["rows"]):
        alone = chosen(content["rows"], task=task, method="serial", augment=augment)
        serial = {row["case"]["seed"]: row["last"] for row in alone}
        behind = [row["last"] - serial[row["case"]["seed"]] for row in own if row["case"]["seed"] in serial]
        lines.append(
            [
                task,
                title(method),
                str(workers),
                "yes" if augment else "no",
                spread(row["last"] for row in own),
                "-" if method == "serial" or not behind else f"{mean(behind):+.2f}",
                str(len(own)),
            ]
        )
    header = ["task", "method", "K", "augmentation", "test, %", "against one process, points", "n"]
    return Grid("Test accuracy of the full model", header, lines)


def speed(content: Content) -> Grid:
    cores, lines = content["machine"]["cores"], []
    for task, method, workers, augment, own in kinds(content["rows"]):
        if workers == 1 and method != "serial":
            continue
        alone = chosen(content["rows"], task=task, method="serial", augment=augment)
        epochs = [row["step_seconds"] * row["steps_per_epoch"] for row in own]
        lines.append(
            [
                task,
                title(method),
                f"{workers} (oversubscribed)" if workers > cores else str(workers),
                "yes" if augment else "no",
                f"{mean(epochs):.2f}",
                *speed_ups(own, alone),
                f"{mean(row['training_seconds'] for row in own):.1f}",
            ]
        )
    header = ["task", "method", "K", "augmentation", "seconds per epoch", "speed-up, measured", "predicted"]
    return Grid("Seconds", [*header, "seconds of training, warm-up included"], lines)


def sizes(content: Content) -> Grid:
    """Of the worker that holds, or sends, the most."""
    lines = []
    for task, method, workers, augment, own in kinds(content["rows"]):
        if not augment and method == "serial":
            continue
        row = own[0]
        counted = [sent for sent in row["sent_by_step"] if sent is not None]
        lines.append(
            [
                task,
                title(method),
                str(workers),
                f"{sum(row['parameters']):,}",
                bytes_in_words(max(row["held_bytes"])),
                bytes_in_words(max(row["held_by_formula"])),
                bytes_in_words(max(row["stored_bytes"])) if stored(method) else "-",
                bytes_in_words(max(counted)) if counted and workers > 1 else "-",
                bytes_in_words(max(row["sent_by_formula"])) if workers > 1 else "-",
            ]
        )
    header = ["task", "method", "K", "parameters", "held: live", "held: by formula", "stored guesses"]
    return Grid("Bytes of a worker, the most", [*header, "sent per step: counted", "by formula"], lines)


def explanation(content: Content) -> Grid:
    """What the stages have learned to work with, beside what they are given when they are put in sequence."""
    lines = []
    for task, method, workers, _, own in kinds(content["rows"]):
        if method not in (*AUXNET, HYBRID) or workers == 1:
            continue
        mismatches = [row["mismatch"] or [] for row in own]
        lines.append(
            [
                task,
                title(method),
                str(workers),
                spread(row["last"] for row in own),
                spread(row["running"] for row in own if row["running"] is not None),
                spread(row["aux_fed"] for row in own if row["aux_fed"] is not None),
                ", ".join(f"{mean(boundary):.2f}" for boundary in zip(*mismatches, strict=True)) or "-",
                str(len(own)),
            ]
        )
    header = ["task", "method", "K", "stages in sequence, %", "with running statistics, %"]
    header += ["last stage fed by its auxiliary network, %", "mismatch per boundary", "n"]
    return Grid("Where accuracy is lost", header, lines)


GRIDS: dict[str, tuple[Callable[[Content], Grid], ...]] = {
    "accuracy": (accuracy, speed, sizes, explanation),
    "sweep": (betas, betas_of_others, aux_rates, warmups, hybrids, lambda_steps),
    "timing": (timing,),
    "links": (links, link_bytes),
}


def grids(name: str, content: Content) -> list[Grid]:
    """All tables of a study."""
    return [make(content) for make in GRIDS[name]]


def read(name: str, folder: Path = RESULTS) -> Content | None:
    """A result file; None if there is none, or no row in it."""
    path = folder / f"{name}.jsonl"
    content: Content | None = read_if_made(path)
    return content if content and content["rows"] else None


def _written(name: str, make: Callable[[Content], Grid]) -> str:
    return _told(name, lambda content: make(content).markdown())


def _told(name: str, tell: Callable[[Content], str]) -> str:
    content = read(name)
    return tell(content) if content else NOT_YET


def conditions(content: Content) -> str:
    """What the accuracies were measured with."""
    machine, lines = content["machine"], []
    for name in distinct(content["rows"], "task"):
        task, scale = ALL[name], ALL[name].scales[content["settings"]["size"]]
        rows = chosen(content["rows"], task=name)
        lines.append(
            f"- `{name}`: {task.title}, {task.pixels} x {task.pixels} pixels; pre-activation network of "
            f"{layers(scale.blocks)} layers, widths {scale.width}, {2 * scale.width}, {4 * scale.width}, "
            f"{sum(rows[0]['parameters']):,} parameters; {rows[0]['steps']} steps of batch {scale.batch}, "
            f"{rows[0]['steps_per_epoch']} to an epoch; SGD, momentum 0.9, decay 5e-4, rate {task.lr:g}, ÷10 at 50 % "
            f"and 75 %; cuts {_cuts(scale.cuts)}.\n"
        )
    return "".join([*lines, f"- n = {seeds(content['rows'])} seeds, mean ± standard deviation. {on(machine)}.\n"])


def _cuts(cuts: dict[int, tuple[str, ...]]) -> str:
    return "; ".join(f"K = {workers}: behind {', '.join(names)}" for workers, names in cuts.items())


def on(machine: dict[str, Any]) -> str:
    """Hardware and versions."""
    return (
        f"One thread per process, {machine['cores']} CPU cores ({machine['processor']}), torch {machine['torch']}, gloo"
    )


def sweep_conditions(content: Content) -> str:
    """What the sweep was measured with."""
    return f"K = {SWEEP_WORKERS}, one seed, accuracies on the hold-out. {on(content['machine'])}.\n"


def timing_conditions(content: Content) -> str:
    """What the steps were timed with."""
    repeats, steps = seeds(content["rows"]), content["settings"]["steps"]
    serial = seconds_of(content["rows"])
    return (
        f"K = 2; median of the last two thirds of {steps} steps, mean over n = {repeats} trainings, turn and turn about; "
        f"{len(serial)} networks. {on(content['machine'])}.\n"
    )


def link_conditions(content: Content) -> str:
    """What the steps over links were timed with."""
    rows, settings = content["rows"], content["settings"]
    networks = []
    for name in distinct(rows, "task"):
        scale = ALL[name].scales[settings["size"]]
        networks.append(f"{name} behind {', '.join(scale.cuts[2])}, batch {scale.batch}")
    return (
        f"K = 2, cut at {'; '.join(networks)}. Median of the steps behind the first third of {settings['link_steps']}, "
        f"median over n = {seeds(rows)} trainings, turn and turn about. {on(content['machine'])}.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "auxnet_conditions": partial(_told, "accuracy", conditions),
    "auxnet_sweep_conditions": partial(_told, "sweep", sweep_conditions),
    "auxnet_timing_conditions": partial(_told, "timing", timing_conditions),
    "auxnet_link_conditions": partial(_told, "links", link_conditions),
    **{f"auxnet_{make.__name__}": partial(_written, name, make) for name, makes in GRIDS.items() for make in makes},
}

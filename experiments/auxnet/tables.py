"""The tables of AuxNet's experiments: accuracies, seconds and bytes; those of the sweep and the links stand beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.auxnet import link_tables, sweep_tables
from experiments.auxnet.cases import ALL, AUXNET, HYBRID, LATE, SWEEP_WORKERS, TITLES, stored, title
from experiments.auxnet.closed_form import hybrid_speed_up, pipeline_speed_up
from experiments.auxnet.link_tables import methods_of, milliseconds, pairs
from experiments.harness.tables import (
    Content,
    Grid,
    Row,
    Rows,
    chosen,
    distinct,
    grouped,
    machine,
    mean_of,
    page_tables,
    seeds,
    spread,
)  # fmt: skip
from experiments.harness.words import bytes_in_words
from experiments.networks import layers

RESULTS = Path(__file__).parent / "results"


def kinds(content: Content) -> Iterator[tuple[list[Any], Rows]]:
    """Task, method, workers and augmentation, with their rows."""
    return grouped(content["rows"], "task", "method", "workers", "augment", titles=TITLES)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _alone(content: Content, own: Rows) -> Rows:
    """Rows of a single process with the same augmentation: the fair baseline of a method that must do without."""
    case = own[0]["case"]
    return chosen(content["rows"], task=case["task"], method="serial", augment=case["augment"])


def accuracy(content: Content) -> Grid:
    """Test accuracies, against one process with the same seeds and augmentation."""
    lines = []
    for (task, method, workers, augment), own in kinds(content):
        behind = [row["last"] - other["last"] for row, other in pairs(own, _alone(content, own))]
        difference = "-" if method == "serial" or not behind else f"{mean(behind):+.2f}"
        lines.append([task, title(method), workers, _yes(augment), mean_of(own, "last"), difference, len(own)])
    header = ["task", "method", "K", "augmentation", "test, %", "against one process, points", "n"]
    return Grid("Test accuracy of the full model", header, lines)


def speed(content: Content) -> Grid:
    cores, lines = content["machine"]["cores"], []
    for (task, method, workers, augment), own in kinds(content):
        simulated = "step_seconds" not in own[0]
        if simulated or (workers == 1 and method != "serial"):
            continue
        epoch = mean(row["step_seconds"] * row["steps_per_epoch"] for row in own)
        many = f"{workers} (oversubscribed)" if workers > cores else workers
        start = [task, title(method), many, _yes(augment), f"{epoch:.2f}"]
        trained = mean(row["training_seconds"] for row in own)
        lines.append([*start, *speed_ups(own, _alone(content, own)), f"{trained:.1f}"])
    header = ["task", "method", "K", "augmentation", "seconds per epoch", "speed-up, measured", "predicted"]
    return Grid("Seconds", [*header, "seconds of training, warm-up included"], lines)


def sizes(content: Content) -> Grid:
    """Memory and bytes of the worker that holds, or sends, the most."""
    lines = []
    for (task, method, workers, augment), own in kinds(content):
        if "held_bytes" not in own[0] or (not augment and method == "serial"):
            continue
        row, several = own[0], workers > 1

        def most(key: str, shown: bool = True, row: Row = row) -> str:
            counted = [number for number in row[key] if number is not None]
            return bytes_in_words(max(counted)) if shown and counted else "-"

        start = [task, title(method), workers, f"{sum(row['parameters']):,}"]
        held = [most("held_bytes"), most("held_by_formula"), most("stored_bytes", stored(method))]
        lines.append([*start, *held, most("sent_by_step", several), most("sent_by_formula", several)])
    header = ["task", "method", "K", "parameters", "held: live", "held: by formula", "stored guesses"]
    return Grid("Bytes of a worker, the most", [*header, "sent per step: counted", "by formula"], lines)


def explanation(content: Content) -> Grid:
    """Accuracies with the statistics and the input that the stages were trained with, beside those in sequence."""
    lines = []
    for (task, method, workers, _), own in kinds(content):
        if method not in (*AUXNET, HYBRID, *LATE) or workers == 1:
            continue
        found = [spread(row[key] for row in own if row[key] is not None) for key in ("last", "running", "aux_fed")]
        mismatches = zip(*(row["mismatch"] or [] for row in own), strict=True)
        wrong = ", ".join(f"{mean(boundary):.2f}" for boundary in mismatches) or "-"
        lines.append([task, title(method), workers, *found, wrong, len(own)])
    header = ["task", "method", "K", "stages in sequence, %", "with running statistics, %"]
    header += ["last stage fed by its auxiliary network, %", "mismatch per boundary", "n"]
    return Grid("Where accuracy is lost", header, lines)


def speed_ups(own: Rows, alone: Rows) -> list[str]:
    """Measured and predicted speed-up over one process, as cells."""
    if not alone or own[0]["case"]["method"] == "serial":
        return ["1.00" if alone else "-", "-"]
    serial = mean(row["step_seconds"] for row in alone)
    found = [f"{serial / mean(row['step_seconds'] for row in own):.2f}"]
    case = own[0]["case"]
    if case["method"] == "pipeline":
        data = mean(row["data_seconds"] for row in alone)
        return [*found, f"{pipeline_speed_up(case['workers'], case['micro_batches'], serial - data, data):.2f}"]
    predicted = [row["predicted"] for row in own if row["predicted"] is not None]
    if case["serial_every"]:
        predicted = [hybrid_speed_up(parallel, case["serial_every"]) for parallel in predicted]
    return [*found, f"{mean(predicted):.2f}" if predicted else "-"]


def timing(content: Content) -> Grid:
    lines = []
    for (task, method, schedule), own in methods_of(content["rows"], "task"):
        scale = ALL[task].scales[content["settings"]["size"]]
        network = f"{layers(scale.blocks)} layers, width {scale.width}, {ALL[task].pixels} pixels, batch {scale.batch}"
        alone = chosen(content["rows"], task=task, method="serial")
        start = [network, title(method, schedule), own[0]["case"]["workers"]]
        lines.append([*start, *milliseconds(own, mean), *speed_ups(own, alone), len(own)])
    header = ["network", "method", "K", "ms per step", "least to most", "speed-up, measured", "predicted", "n"]
    return Grid("Time of a step", header, lines)


SCHEDULES = {"steps": "÷10 at 50 % and 75 %", "one_cycle": "at the top of one cycle"}


def conditions(content: Content) -> str:
    """The conditions of the accuracies."""
    lines = []
    for name in distinct(content["rows"], "task"):
        task, scale = ALL[name], ALL[name].scales[content["settings"]["size"]]
        rows = chosen(content["rows"], task=name)
        lines.append(
            f"- `{name}`: {task.title}, {task.pixels} x {task.pixels} pixels; pre-activation network of "
            f"{layers(scale.blocks)} layers, widths {scale.width}, {2 * scale.width}, {4 * scale.width}, "
            f"{sum(rows[0]['parameters']):,} parameters; {rows[0]['steps']} steps of batch {scale.batch}, "
            f"{rows[0]['steps_per_epoch']} to an epoch; SGD, momentum 0.9, decay 5e-4, rate {task.lr:g}, "
            f"{SCHEDULES[task.schedule]}{', channels last' if task.channels_last else ''}; cuts {_cuts(scale.cuts)}.\n"
        )
    return "".join([*lines, f"- n = {seeds(content['rows'])} seeds, mean ± standard deviation. {on(content)}.\n"])


def _cuts(cuts: dict[int, tuple[str, ...]]) -> str:
    return "; ".join(f"K = {workers}: behind {', '.join(names)}" for workers, names in cuts.items())


def on(content: Content) -> str:
    """Hardware and versions."""
    return f"One thread per process, {machine(content)}, gloo"


def sweep_conditions(content: Content) -> str:
    """The conditions of the sweep."""
    return f"K = {SWEEP_WORKERS}, one seed, accuracies on the hold-out. {on(content)}.\n"


def timing_conditions(content: Content) -> str:
    """The conditions of the timed steps."""
    rows, steps = content["rows"], content["settings"]["steps"]
    return (
        f"K = 2; median of the last two thirds of {steps} steps, mean over n = {seeds(rows)} interleaved trainings; "
        f"{len(distinct(rows, 'task'))} networks. {on(content)}.\n"
    )


def link_conditions(content: Content) -> str:
    """The conditions of the steps over links."""
    rows, settings = content["rows"], content["settings"]
    networks = []
    for name in distinct(rows, "task"):
        scale = ALL[name].scales[settings["size"]]
        networks.append(f"{name} behind {', '.join(scale.cuts[2])}, batch {scale.batch}")
    return (
        f"K = 2, cut at {'; '.join(networks)}. Median of the steps behind the first third of {settings['link_steps']}, "
        f"median over n = {seeds(rows)} interleaved trainings. {on(content)}.\n"
    )


STUDIES = {
    "accuracy": (conditions, accuracy, speed, sizes, explanation),
    "sweep": (sweep_conditions, *sweep_tables.MADE),
    "timing": (timing_conditions, timing),
    "links": (link_conditions, *link_tables.MADE),
}
TABLES = page_tables(RESULTS, STUDIES, "auxnet_")

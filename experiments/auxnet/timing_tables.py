"""The table of step times, measured and predicted."""

from __future__ import annotations

from statistics import mean
from typing import Any

from experiments.accuracy.tables import Rows, chosen, distinct
from experiments.auxnet.closed_form import hybrid_speed_up, pipeline_speed_up
from experiments.auxnet.networks import layers
from experiments.auxnet.tasks import ALL
from experiments.auxnet.words import TITLES, title
from experiments.paper_tables.tables import Grid

Content = dict[str, Any]


def seconds_of(rows: Rows) -> dict[str, float]:
    """Of a step in one process, by task."""
    alone = chosen(rows, method="serial")
    return {task: mean(row["step_seconds"] for row in chosen(alone, task=task)) for task in distinct(alone, "task")}


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
    rows, size, lines = content["rows"], content["settings"]["size"], []
    for task in distinct(rows, "task"):
        scale = ALL[task].scales[size]
        network = f"{layers(scale.blocks)} layers, width {scale.width}, {ALL[task].pixels} pixels, batch {scale.batch}"
        alone = chosen(rows, task=task, method="serial")
        for method in TITLES:
            own = chosen(rows, task=task, method=method)
            for schedule in distinct(own, "schedule"):
                these = chosen(own, schedule=schedule)
                seconds = [1000 * row["step_seconds"] for row in these]
                lines.append(
                    [
                        network,
                        title(method, schedule),
                        str(these[0]["case"]["workers"]),
                        f"{mean(seconds):.1f}",
                        f"{min(seconds):.1f} to {max(seconds):.1f}",
                        *speed_ups(these, alone),
                        str(len(these)),
                    ]
                )
    header = ["network", "method", "K", "ms per step", "least to most", "speed-up, measured", "predicted", "n"]
    return Grid("Time of a step", header, lines)

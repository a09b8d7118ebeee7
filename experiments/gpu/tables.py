"""The tables of the measurements on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.harness.tables import Content, Grid, Row, Rows, page_tables

RESULTS = Path(__file__).parent / "results"
METHODS = {"resist": "ResIST", "local_sgd": "local SGD", "ist": "IST", "single": "one process"}


def conditions(content: Content) -> str:
    """Hardware and versions."""
    machine = content["machine"]
    versions = [
        f"{name} {machine[name]}"
        for name in ("driver", "cuda", "nccl", "torch", "lightning", "python")
        if machine.get(name)
    ]
    device = f"{machine['gpu']}, {machine['gpu_memory']}" if machine["gpu"] else "no GPU"
    return f"{device}; {', '.join(versions)}.\n"


def probes(content: Content) -> Grid:
    return Grid.of("NCCL ranks on one GPU", content["rows"], {
        "": lambda row: f"{row['case']['ranks']} ranks{', classic backend' if row['case']['classic'] else ''}",
        "outcome": outcome,
        "backend": lambda row: row.get("class", "-"),
        "all-reduce of 4 MB": lambda row: seconds(row.get("all_reduce_seconds")),
    })  # fmt: skip


def contracts(content: Content) -> Grid:
    return Grid.of("Real ranks against the simulator", in_order(content, "devices_per_worker", "ranks", "method"), {
        "": lambda row: METHODS[row["case"]["method"]],
        "workers": lambda row: row["case"]["ranks"] // row["case"]["devices_per_worker"],
        "ranks of a worker": lambda row: row["case"]["devices_per_worker"],
        "outcome": lambda row: "; ".join(row["broken"]) or "agrees" if done(row) else outcome(row),
        "over": lambda row: row.get("backend", "-"),
        "tensors equal bit for bit": lambda row: f"{row['equal_tensors']} of {row['tensors']}" if done(row) else "-",
        "largest difference": lambda row: number(row.get("largest_difference")),
        "largest change by training": lambda row: number(row.get("largest_change_by_training")),
        "evaluations apart by": lambda row: number(row.get("largest_difference_of_evaluations")),
    })  # fmt: skip


def memory(content: Content) -> Grid:
    """Memory of worker 0 at rest, and at the peak of each phase."""
    rows: list[list[object]] = []
    for row in content["rows"]:
        if not done(row):
            rows.append([outcome(row), "-", "-", "-"])
            continue
        worker = row["by_worker"][0]
        rest = worker["at_rest"]
        bound = rest["closed_form"]
        held = rest.get("allocated", rest["held"])
        rows.append(["between two local steps", megabytes(held), f"{held / bound:.3f}", "-"])
        for phase, peak in worker["peaks"].items():
            found = peak.get("allocated")
            ratio = f"{found / bound:.3f}" if found else "-"
            rows.append([f"peak of {phase}", megabytes(found), ratio, megabytes(peak.get("reserved"))])
        rows.append(["closed form of the sub-network", megabytes(bound), "1.000", "-"])
        rows.append(["closed form of the full model", megabytes(worker["full"]), f"{worker['full'] / bound:.3f}", "-"])
    return Grid("Memory of worker 0", ["", "held or allocated", "of the closed form", "reserved"], rows)


def steps(content: Content) -> Grid:
    def median(row: Row, name: str) -> str:
        return seconds(row["median_seconds"][name]) if done(row) else outcome(row)

    return Grid.of("A local step", content["rows"], {
        "": lambda row: row["case"]["mode"],
        "sub-network": lambda row: median(row, "sub-network"),
        "plain loop": lambda row: median(row, "plain loop"),
        "ratio": lambda row: f"{row['ratio']:.3f}" if done(row) else "-",
        "graphs of the first round": lambda row: row.get("graphs", "-"),
        "recompiles after it": lambda row: row.get("recompiles", "-"),
    })  # fmt: skip


def faults(content: Content) -> Grid:
    return Grid.of("Faults", in_order(content, "backend", "place", "kind"), {
        "in worker 1": lambda row: f"{row['case']['kind']}, {row['case']['place']}",
        "over": lambda row: row["case"]["backend"],
        "outcome": lambda row: "; ".join(row["findings"]) or "as promised" if done(row) else outcome(row),
        "worker 0 ends": lambda row: end_of(row, 0),
        "after": lambda row: seconds(row.get("survivor_seconds")),
        "worker 1 ends": lambda row: end_of(row, 1),
    })  # fmt: skip


def accuracy(content: Content) -> Grid:
    rows: Rows = content["rows"]
    return Grid.of("Accuracy after a fixed time", rows, {
        "": lambda row: f"{METHODS[row['case']['method']]}, S = {row['case']['workers']}",
        "outcome": outcome,
        "samples": lambda row: f"{row['samples']:,}" if done(row) else "-",
        "passes": lambda row: f"{row['samples'] / row['training_images']:.1f}" if done(row) else "-",
        "test, %": lambda row: f"{row['test']:.2f}" if done(row) else "-",
        "hold-out, %": lambda row: f"{row['holdout']:.2f}" if done(row) else "-",
    })  # fmt: skip


def in_order(content: Content, *keys: str) -> Rows:
    """Rows sorted by values of their cases: cases that ran together were written as they ended."""
    return sorted(content["rows"], key=lambda row: [row["case"][key] for key in keys])


def done(row: Row) -> bool:
    return bool(row["outcome"] == "done")


def outcome(row: Row) -> str:
    """The outcome in a cell, with the reason in one line."""
    if done(row):
        return "done"
    return f"{row['outcome']}: {' '.join(row['reason'].split())[-160:]}".replace("|", "/")


def end_of(row: Row, worker: int) -> str:
    if not done(row):
        return "-"
    error: dict[str, Any] | None = row["errors"][worker]
    return row["ends"][worker] + (f", {error['type']}" if error else "")


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.2f} ms" if value < 1 else f"{value:.1f} s"


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} MB"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


STUDIES = {
    "probes": (conditions, probes),
    **{make.__name__: (make,) for make in (contracts, memory, steps, faults, accuracy)},
}
TABLES = page_tables(RESULTS, STUDIES, "gpu_")

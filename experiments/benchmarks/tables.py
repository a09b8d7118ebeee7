"""The tables of README.md and of the benchmarks' page, from their result files (python experiments/tables.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from experiments.tables import markdown

RESULTS = Path(__file__).parent / "results"

RUNS = {"resist": "ResIST", "local_sgd": "local SGD", "ddp": "DDP (Lightning's)", "single": "one process"}


def record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def runs(prefix: str) -> str:
    """Accuracy, parameters and bytes of the methods on the same work."""
    rows = []
    for name, title in RUNS.items():
        path = RESULTS / f"{prefix}_{name}.json"
        if not path.exists():
            continue
        run = json.loads(path.read_text())
        sent, parameters, seconds = run["sent_bytes"], run["parameters"], run["seconds"]
        rows.append(
            [
                f"{title}, {run['workers']} worker{'s' if run['workers'] > 1 else ''}",
                f"{100 * run['test']['accuracy']:.2f} %",
                f"{parameters['held_by_one_worker']:,} ({100 * parameters['held_share']:.0f} %)",
                megabytes(sent["training"]) if run["workers"] > 1 else "0",
                str(run["local_steps"]),
                f"{seconds['training']:.0f} s",
            ]
        )
    header = ["", "test accuracy", "parameters in a worker", "sent by a worker", "local steps", "training time"]
    return markdown(header, rows)


def demo() -> str:
    return runs("demo")


def cifar() -> str:
    return runs("cifar")


def held_memory() -> str:
    """Parameters, gradients and momentum that workers held."""
    rows = []
    for workers in (2, 4):
        content = record(f"held_memory_{workers}")
        measured = content["worst_bytes_by_worker"]
        held, bound = mean(row["held"] for row in measured), mean(row["bound"] for row in measured)
        full = content["full_bytes"]
        rows.append([str(workers), megabytes(held), megabytes(bound), megabytes(full), f"{held / full:.3f}"])
    return markdown(["workers", "held (mean)", "bound 3 (Q + k b)", "full model", "share"], rows)


def step_time() -> str:
    content = record("step_time")
    rows = [[name, f"{value * 1000:.1f} ms"] for name, value in content["median_seconds"].items()]
    return markdown(["", "median local step"], [*rows, ["ratio", f"{content['ratio']:.3f}"]])


def overhead() -> str:
    """Seconds per step of one process, and what they have above a plain loop."""
    content = record("overhead")
    plain = content["median_seconds"]["plain loop"]
    rows = [
        [name, f"{1e3 * value:.2f} ms", f"{1e3 * (value - plain):.2f} ms", str(content["n"][name])]
        for name, value in content["median_seconds"].items()
    ]
    return markdown(["", "median step", "above the plain loop", "n"], rows)


def policies(name: str) -> str:
    """Test accuracy by momentum and batch-norm policy, at the default scale, and by scale at the default policies."""
    rows = record(f"policies_{name}")["rows"]

    def cell(momentum: str, norm: str, scale: str) -> str:
        found = [r for r in rows if (r["momentum"], r["batch_norm"], r["scale"]) == (momentum, norm, scale)]
        values = found[0]["test_accuracy"]
        return f"{mean(values):.2f} ± {pstdev(values):.2f}"

    norms = ("recalibrate", "running", "batch")
    table = [[f"momentum `{m}`", *(cell(m, n, "held share") for n in norms)] for m in ("reset", "keep", "travel")]
    table += [[f"`reset`, scale {s}", *(cell("reset", n, s) for n in norms)] for s in ("1/S", "none")]
    return markdown(["test accuracy, %", *(f"`{norm}`" for norm in norms)], table)


def policies_digits() -> str:
    return policies("digits")


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (demo, cifar, held_memory, step_time, overhead, policies_digits)
}

"""The tables of README.md and of the benchmarks' page, from their result files (python experiments/harness/tables.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from experiments.harness.record import read_record
from experiments.harness.tables import markdown

RESULTS = Path(__file__).parent / "results"

RUNS = {"resist": "ResIST", "local_sgd": "local SGD", "ddp": "DDP (Lightning's)", "single": "one process"}


def record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = read_record(RESULTS / f"{name}.jsonl")
    return content


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def runs(prefix: str) -> str:
    """Accuracy, parameters and bytes of the methods on the same work."""
    rows = []
    for name, title in RUNS.items():
        path = RESULTS / f"{prefix}_{name}.jsonl"
        if not path.exists():
            continue
        run = read_record(path)
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


def check_cost() -> str:
    """Seconds of a sync with and without hashes of the shared tensors, and of the search for NaN."""
    content = record("check_cost")
    sync, hashes = content["median_sync_seconds"], content["median_hash_seconds"]
    rows = [
        [f"check `{check}`", f"{1e3 * sync[check]:.0f} ms", f"{sync[check] / sync['off']:.3f}", f"{1e3 * alone:.1f} ms"]
        for check, alone in {"off": 0.0, **hashes}.items()
    ]
    search = content["median_search_seconds"]
    table = [*rows, ["search for NaN (always)", "", "", f"{1e3 * search:.1f} ms"]]
    return markdown(["", "median sync", "ratio", "alone"], table)


def recovery_rows(content: dict[str, Any]) -> dict[str, list[list[str]]]:
    """What it costs to lose little when workers die: the rows of three tables, each with its header."""
    snapshots = [["a snapshot every", "file of a worker", "median write", "share of rounds of 50 local steps"]]
    for every in map(str, content["settings"]["every"]):
        row, each = content["snapshots"][every], "round" if every == "1" else f"{every} rounds"
        seconds, share = row["median_write_seconds"], row["share_of_training"]
        size = megabytes(mean(row["bytes_by_worker"]))
        snapshots.append([each, size, f"{1e3 * seconds:.0f} ms", f"{100 * share:.2f} %"])
    files = [
        ["", "model's file", "file of a worker", "median save", "ratio", "`fit` to the first batch", "from nothing"]
    ]
    saved, median_seconds = content["checkpoints"], content["resumes"]["median_seconds"]
    for title, name, way, plain in (
        ("checkpoint in mid-round", "resist", "workers' files", "from the beginning"),
        ("Lightning's DDP", "ddp", "DDP's checkpoint", "DDP from the beginning"),
    ):
        row = saved[name]
        own = megabytes(mean(row["bytes_by_worker"])) if row["bytes_by_worker"] else ""
        seconds, ratio = row["median_seconds"], row["median_seconds"] / saved["ddp"]["median_seconds"]
        ways = [f"{median_seconds[way]:.2f} s", f"{median_seconds[plain]:.2f} s"]
        files.append([title, megabytes(row["bytes"]), own, f"{seconds:.2f} s", f"{ratio:.2f}", *ways])
    files.append(["snapshots", *[""] * 4, f"{median_seconds['snapshots']:.2f} s", files[1][-1]])
    steps = [["", "local step", "ratio", "added"]]
    names = {"neither": "without both", "watch": "liveness watch", "notes": "notes of the place in the data"}
    for name, value in content["added"]["median_step_seconds"].items():
        ratio, more = content["added"]["median_ratio"][name], content["added"]["median_added_seconds"][name]
        steps.append([names.get(name, name), f"{1e3 * value:.3f} ms", f"{ratio:.3f}", f"{1e6 * more:.0f} µs"])
    return {"snapshots": snapshots, "checkpoints": files, "steps": steps}


def recovery(part: str) -> str:
    if not (RESULTS / "recovery.jsonl").exists():
        return "not measured yet\n"
    header, *rows = recovery_rows(record("recovery"))[part]
    return markdown(header, rows)


def recovery_snapshots() -> str:
    return recovery("snapshots")


def recovery_checkpoints() -> str:
    return recovery("checkpoints")


def recovery_steps() -> str:
    return recovery("steps")


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
    table.__name__: table
    for table in (
        demo, cifar, held_memory, step_time, overhead, check_cost, recovery_snapshots, recovery_checkpoints,
        recovery_steps, policies_digits,
    )
}  # fmt: skip

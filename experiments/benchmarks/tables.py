"""The tables of README.md and of the benchmarks' page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from experiments.harness.record import read_record
from experiments.harness.tables import Content, Grid, Rows, page_tables

RESULTS = Path(__file__).parent / "results"
PHASES = ("start", "training", "sync", "evaluation", "checkpoint", "end", "resume")
METHODS = {
    "ddp": "DDP",
    "local_sgd": "local SGD",
    "resist": "ResIST, built whole",
    "resist_late": "ResIST, `configure_model`, `first`",
}
EVALUATED = {
    "all": 'all workers (`evaluate_on="all"`)',
    "first": 'worker 0 (`evaluate_on="first"`)',
    "evaluator": "an evaluator",
}
RUNS = {"resist": "ResIST", "local_sgd": "local SGD", "ddp": "DDP (Lightning's)", "single": "one process"}


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
        sent = run["sent_bytes"]
        parameters = run["parameters"]
        seconds = run["seconds"]
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
    return Grid("", header, rows).markdown()


def held_memory() -> str:
    """Parameters, gradients and momentum that workers held."""
    rows = []
    for many in (2, 4):
        content = read_record(RESULTS / f"held_memory_{many}.jsonl")
        workers = content["worst_bytes_by_worker"]
        full = content["full_bytes"]
        held = mean(worker["held"] for worker in workers)
        bound = mean(worker["bound"] for worker in workers)
        rows.append([many, megabytes(held), megabytes(bound), megabytes(full), f"{held / full:.3f}"])
    return Grid("", ["workers", "held (mean)", "bound 3 (Q + k b)", "full model", "share"], rows).markdown()


def step_time(content: Content) -> Grid:
    rows = [[name, f"{value * 1000:.1f} ms"] for name, value in content["median_seconds"].items()]
    return Grid("A local step", ["", "median local step"], [*rows, ["ratio", f"{content['ratio']:.3f}"]])


def overhead(content: Content) -> Grid:
    """Seconds per step of one process, and their excess over a plain loop."""
    plain = content["median_seconds"]["plain loop"]
    return Grid.of("One process", content["median_seconds"].items(), {
        "": lambda item: item[0],
        "median step": lambda item: f"{1e3 * item[1]:.2f} ms",
        "above the plain loop": lambda item: f"{1e3 * (item[1] - plain):.2f} ms",
        "n": lambda item: content["n"][item[0]],
    })  # fmt: skip


def check_cost(content: Content) -> Grid:
    """Seconds of a sync with and without hashes of the shared tensors, and of the search for NaN."""
    sync = content["median_sync_seconds"]
    rows = [
        [f"check `{check}`", f"{1e3 * sync[check]:.0f} ms", f"{sync[check] / sync['off']:.3f}", f"{1e3 * alone:.1f} ms"]
        for check, alone in {"off": 0.0, **content["median_hash_seconds"]}.items()
    ]
    search = ["search for NaN (always)", "", "", f"{1e3 * content['median_search_seconds']:.1f} ms"]
    return Grid("Checks", ["", "median sync", "ratio", "alone"], [*rows, search])


def wires(content: Content) -> Grid:
    """Seconds of computing of a worker in a sync, by wire format."""
    exact = next(row for row in content["rows"] if row["wire"] == "fp32")
    before = any(row["before"] for row in content["rows"])
    columns: dict[str, Callable[[Any], Any]] = {
        "wire": lambda row: f"`{row['wire']}`",
        "sent by a worker": lambda row: f"{row['sent_bytes'] / 1e6:.2f} MB",
        "of fp32": lambda row: f"{row['sent_bytes'] / exact['sent_bytes']:.3f}",
        "computes": lambda row: f"{row['seconds']:.3f} s",
    }
    if before:
        columns["before"] = lambda row: f"{row['before']['seconds']:.3f} s" if row["before"] else "-"
        columns["ratio"] = lambda row: f"{row['seconds'] / row['before']['seconds']:.2f}" if row["before"] else "-"
    return Grid.of("A sync", content["rows"], columns)


def recovery_snapshots(content: Content) -> Grid:
    """The cost of snapshots."""
    rows = []
    for every in map(str, content["settings"]["every"]):
        row = content["snapshots"][every]
        each = "round" if every == "1" else f"{every} rounds"
        seconds, share = row["median_write_seconds"], row["share_of_training"]
        size = megabytes(mean(row["bytes_by_worker"]))
        rows.append([each, size, f"{1e3 * seconds:.0f} ms", f"{100 * share:.2f} %"])
    header = ["a snapshot every", "file of a worker", "median write", "share of rounds of 50 local steps"]
    return Grid("Snapshots", header, rows)


def recovery_checkpoints(content: Content) -> Grid:
    rows = []
    saved = content["checkpoints"]
    median_seconds = content["resumes"]["median_seconds"]
    for title, name, way, plain in (
        ("checkpoint in mid-round", "resist", "workers' files", "from the beginning"),
        ("Lightning's DDP", "ddp", "DDP's checkpoint", "DDP from the beginning"),
    ):
        row = saved[name]
        own = megabytes(mean(row["bytes_by_worker"])) if row["bytes_by_worker"] else ""
        seconds = row["median_seconds"]
        ratio = row["median_seconds"] / saved["ddp"]["median_seconds"]
        ways = [f"{median_seconds[way]:.2f} s", f"{median_seconds[plain]:.2f} s"]
        rows.append([title, megabytes(row["bytes"]), own, f"{seconds:.2f} s", f"{ratio:.2f}", *ways])
    rows.append(["snapshots", *[""] * 4, f"{median_seconds['snapshots']:.2f} s", rows[0][-1]])
    header = [
        "",
        "model's file",
        "file of a worker",
        "median save",
        "ratio",
        "`fit` to the first batch",
        "from nothing",
    ]
    return Grid("Checkpoints", header, rows)


def recovery_steps(content: Content) -> Grid:
    names = {"neither": "without both", "watch": "watchdog", "notes": "position in the data"}
    added = content["added"]
    return Grid.of("Steps", added["median_step_seconds"].items(), {
        "": lambda item: names.get(item[0], item[0]),
        "local step": lambda item: f"{1e3 * item[1]:.3f} ms",
        "ratio": lambda item: f"{added['median_ratio'][item[0]]:.3f}",
        "added": lambda item: f"{1e6 * added['median_added_seconds'][item[0]]:.0f} µs",
    })  # fmt: skip


def heartbeats_counted(content: Content) -> Grid:
    """Requests, keys and bytes of all workers at the store in a second."""
    return Grid.of("Asked of the store in a second", content["counted"], {
        "workers": lambda row: f"{row['workers']:,}",
        "requests": lambda row: f"{row['requests']:,}",
        "keys": lambda row: f"{row['keys']:,}",
        "sent to and from the store": lambda row: megabytes(row["bytes"]),
        "keys where each worker reads all lines": lambda row: f"{row['former_keys']:,}",
    })  # fmt: skip


def heartbeats_busy(content: Content) -> Grid:
    """CPU time of a real store for the heartbeats of a second."""
    return Grid.of("A real store is busy in a second for", content["busy"], {
        "workers": lambda row: f"{row['workers']:,}",
        "with two monitors": lambda row: f"{1e3 * row['busy_seconds']:.0f} ms",
        "where each worker reads all lines": lambda row: f"{1e3 * row['former_busy_seconds']:.0f} ms",
    })  # fmt: skip


def heartbeats_lost(content: Content) -> Grid:
    """Time until the others knew of a lost process."""
    words = {"SIGSTOP": "frozen", "SIGKILL": "killed"}
    return Grid.of("Light processes on one machine", content["lost"], {
        "processes": lambda row: row["processes"],
        "one is": lambda row: words[row["how"]],
        "`silence`": lambda row: f"{row['silence']:.0f} s",
        "the first knew after": lambda row: f"{row['first_knew_seconds']:.1f} s",
        "the last knew after": lambda row: f"{row['last_knew_seconds']:.1f} s",
        "store busy before": lambda row: f"{100 * row['store_busy']:.1f} %",
    })  # fmt: skip


def policies(content: Content) -> Grid:
    """Test accuracy by momentum and batch-norm policy, at the default scale, and by scale at the default policies."""
    found = {(row["momentum"], row["batch_norm"], row["scale"]): row["test_accuracy"] for row in content["rows"]}

    def cells(momentum: str, scale: str) -> list[str]:
        of_norms = [found[momentum, norm, scale] for norm in ("recalibrate", "running", "batch")]
        return [f"{mean(values):.2f} ± {pstdev(values):.2f}" for values in of_norms]

    rows = [[f"momentum `{momentum}`", *cells(momentum, "held share")] for momentum in ("reset", "keep", "travel")]
    rows += [[f"`reset`, scale {scale}", *cells("reset", scale)] for scale in ("1/S", "none")]
    return Grid("Policies", ["test accuracy, %", "`recalibrate`", "`running`", "`batch`"], rows)


def most(rows: Rows, method: str, workers: int, phase: str, *, first: bool, what: str = "allocated") -> int:
    """Peak bytes in a phase: of worker 0, or of the worst of the others."""
    mine = [
        row for row in rows if (row["method"], row["workers"]) == (method, workers) and (row["worker"] == 0) == first
    ]
    return max(row[phase][what] for row in mine)


def methods_in(rows: Rows) -> list[str]:
    """The methods that were measured, in the order of their titles."""
    return [method for method in METHODS if any(row["method"] == method for row in rows)]


def held_phases(content: Content) -> Grid:
    """Peak bytes of a worker's tensors in each phase; those of worker 0 in brackets where they differ."""
    return _by_phase(
        content, "allocated", "Most bytes of tensors by phase, of the worst worker but the first (of the first)"
    )


def resident_phases(content: Content) -> Grid:
    """Peak bytes in RAM, likewise."""
    return _by_phase(
        content, "resident", "Most bytes in RAM by phase, of the worst worker but the first (of the first)"
    )


def _by_phase(content: Content, what: str, title: str) -> Grid:
    rows = content["rows"]
    table = []
    for many in sorted({row["workers"] for row in rows}):
        for method in methods_in(rows):
            bound = max(row["bound"] for row in rows if (row["method"], row["workers"]) == (method, many))
            cells = []
            for phase in PHASES:
                first, others = (
                    most(rows, method, many, phase, first=of_first, what=what) for of_first in (True, False)
                )
                cells.append(f"{others / 1e6:.0f} ({first / 1e6:.0f})")
            table.append([many, METHODS[method], f"{bound / 1e6:.0f}", *cells])
            stated = [row["stated"] for row in rows if row["workers"] == many and row["worker"] and "stated" in row]
            if method == "resist_late" and what == "allocated":
                most_stated = [f"{max(each[phase] for each in stated) / 1e6:.0f}" for phase in PHASES]
                table.append([many, "by the closed form, at most", "", *most_stated])
    return Grid(title, ["workers", "MB", "3 (Q + k b)", *PHASES], table)


def limited(content: Content) -> Grid:
    """The outcome of each method under a memory limit."""

    def outcome(row: Any) -> str:
        killed = row.get("killed")
        return f"killed in the phase {killed['phase']}" if killed else "trains, evaluates, saves, resumes"

    return Grid.of("Under a memory limit", content["rows"], {
        "": lambda row: METHODS.get(row["method"], RUNS["single"]),
        "workers": lambda row: row["workers"],
        "weights, gradients, momentum": lambda row: megabytes(content["state_bytes"]),
        "limit of a worker": lambda row: megabytes(row["limits"][-1]),
        "of the first": lambda row: megabytes(row["limits"][0]),
        "outcome": outcome,
    })  # fmt: skip


def evaluations(content: Content) -> Grid:
    """Time that a training lost for each evaluation, in rounds without one; medians over the turns."""
    every, rows = content["settings"]["every"], content["rows"]
    rounds = every * content["settings"]["evaluations"]
    plain = {row["turn"]: row["seconds"] / rounds for row in rows if row["way"] == "none"}
    table = []
    for way, title in EVALUATED.items():
        mine = [row for row in rows if row["way"] == way]
        lost = sorted(every * (row["seconds"] / rounds / plain[row["turn"]] - 1) for row in mine)
        busy = []
        for number in range(len(mine[0]["evaluated"])):
            busy.append(median(seconds / plain[row["turn"]] for row in mine for seconds in row["evaluated"][number]))
        cells = [f"{each:.2f}" for each in busy]
        cells = ["", "", *cells] if way == "evaluator" else [*cells[:2], ""]
        table.append([title, f"{median(lost):.2f} ({lost[0]:.2f} to {lost[-1]:.2f})", *cells])
    header = ["evaluated by", "lost per evaluation", "worker 0 evaluates for", "worker 1", "the evaluator"]
    return Grid(f"In rounds of {median(plain.values()):.2f} s", header, table)


STUDIES = {
    "evaluations": (evaluations,),
    "step_time": (step_time,),
    "overhead": (overhead,),
    "check_cost": (check_cost,),
    "wires": (wires,),
    "held_phases": (held_phases, resident_phases),
    "limited": (limited,),
    "recovery": (recovery_snapshots, recovery_checkpoints, recovery_steps),
    "heartbeats": (heartbeats_counted, heartbeats_busy, heartbeats_lost),
    "policies_digits": (policies,),
}
TABLES: dict[str, Callable[[], str]] = {
    "demo": partial(runs, "demo"), "cifar": partial(runs, "cifar"), "held_memory": held_memory,
    **{name.replace("policies", "policies_digits"): text for name, text in page_tables(RESULTS, STUDIES).items()},
}  # fmt: skip

"""Turns the measurements of the workers into the rows of the table.

Seconds per local step, of a method with rounds: the slowest worker's median step + a sync / local steps of a round; or,
where as many steps were really run between two syncs, the wall clock of the whole window over its steps.
Of DDP: the mean of whole steps; the excess over the median step without communication is its sync, so far as the
backward pass does not hide it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from resist_lightning.comm.byte_formulas import TRAINING_KINDS, ddp_bytes

Row = dict[str, Any]
EACH_STEP = ("gradients", "buffers")  # kinds of bytes inside a worker; some buffers are sent in a sync too
PARTS = ("averaging", "hand_over", "packing")
PARAMETER_SERVER = "parameter_server"


def summarise(settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row per bandwidth and method, and a computed one per bandwidth for the parameter server."""
    rows: list[Row] = []
    for gbit in dict.fromkeys(run["bandwidth_gbit"] for run in runs):  # a link is compared with itself only
        here = [run for run in runs if run["bandwidth_gbit"] == gbit]
        made = [_row(settings, run) for run in here]
        made += _parameter_server(settings, gbit, here, made)
        _compare(made)
        rows += made
    return rows


def _row(settings: Mapping[str, Any], run: Mapping[str, Any]) -> Row:
    workers, local_steps, per_node = run["workers"], settings["local_steps"], settings["per_node"]
    row: Row = {
        "method": run["method"],
        "bandwidth_gbit": run["bandwidth_gbit"],
        "measured": True,
        "peak_rss_bytes": max(worker["peak_rss_bytes"] for worker in workers),
        "held_bytes": max(worker["held_bytes"] for worker in workers),
    }
    if run["method"] == "ddp":
        return row | _ddp(settings, run)
    row["compute_seconds"] = max(median(worker["step_seconds"]) for worker in workers)
    row["inside_bytes"] = _inside_bytes(workers, per_node)
    if run["method"].startswith("none"):
        nothing = {"sync_seconds": 0.0, "parts": None, "ideal_sync_seconds": None, "bytes_per_sync": None}
        return row | nothing | {"local_steps": local_steps, "seconds_per_step": row["compute_seconds"]}
    by_sync = zip(*(worker["syncs"] for worker in workers), strict=True)
    syncs = [max(found, key=moving) for found in by_sync]  # of each sync, as the worker saw it that took the longest
    sync = mean(moving(found) for found in syncs)
    whole = max(worker["window_seconds"] / len(worker["step_seconds"]) for worker in workers)
    seconds = row["compute_seconds"] + sync / local_steps
    if settings["steps_per_round"] == local_steps:  # rounds were really run as long as the table says
        seconds = whole
    return row | {
        "local_steps": local_steps,
        "sync_seconds": sync,
        "parts": {part: mean(found[part] for found in syncs) for part in PARTS},
        "seconds_per_step": seconds,
        "window_seconds_per_step": whole,
        "ideal_sync_seconds": _ideal(run),
        "bytes_per_sync": _bytes(run, per_node),
    }


def moving(sync: Mapping[str, float]) -> float:
    """Seconds of a sync after all workers have come."""
    return sync["seconds"] - sync["waiting"]


def _ideal(run: Mapping[str, Any]) -> float | None:
    """Seconds of a sync over a full-duplex link: of the node that sends or receives the most."""
    if run["bandwidth_gbit"] is None:
        return None
    worst = []
    for sync in zip(*(worker["crossing"] for worker in run["workers"]), strict=True):
        # Both directions at once: the longer one counts.
        worst.append(max(max(own["sent"], own["received"]) for own in sync))
    return mean(worst) * 8 / run["bandwidth_gbit"] / 1e9


def _bytes(run: Mapping[str, Any], per_node: int) -> dict[str, float | None]:
    """Bytes that a node sends in a sync, mean over nodes and syncs; the kernel's with all other traffic.

    Bytes between workers of one node are counted, and in the closed form; they cross no link.
    """
    workers = run["workers"]
    syncs = len(workers[0]["syncs"])
    counted = [sum(worker["counted"].get(kind, 0) for kind in TRAINING_KINDS) for worker in workers]
    form = [sum(own["sent"] for own in worker["closed_form"]) for worker in workers]
    kernel = mean(worker["kernel"]["sent"] for worker in workers) / syncs if "kernel" in workers[0] else None
    crossing = mean(sum(own["sent"] for own in worker["crossing"]) for worker in workers)
    return {
        "kernel": kernel,
        "counted": mean(counted) * per_node / syncs,
        "closed_form": mean(form) * per_node / syncs,
        "crossing": crossing / syncs,
    }


def _inside_bytes(workers: Sequence[Mapping[str, Any]], per_node: int) -> dict[str, float]:
    """Bytes that the members of workers send each other, of one node: in a local step, and beside it in a sync."""
    found = {"step": 0.0, "sync": 0.0}
    for worker in workers:
        for kind, size in worker["inside"].items():
            each_step = kind in EACH_STEP
            times = len(worker["step_seconds" if each_step else "syncs"])
            found["step" if each_step else "sync"] += size / max(times, 1) * per_node / len(workers)
    return found


def _ddp(settings: Mapping[str, Any], run: Mapping[str, Any]) -> Row:
    workers, gbit = run["workers"], run["bandwidth_gbit"]
    steps = settings["ddp_steps"]
    whole = max(worker["window_seconds"] for worker in workers) / steps
    compute = max(median(worker["silent_step_seconds"]) for worker in workers)
    form = ddp_bytes(workers[0]["model_bytes"], len(workers), 1)
    kernel = mean(worker["kernel"]["sent"] for worker in workers) / steps if "kernel" in workers[0] else None
    return {
        "local_steps": 1,
        "compute_seconds": min(compute, whole),  # noise can make the step without communication the longer one
        "sync_seconds": max(0.0, whole - compute),
        "parts": None,
        "seconds_per_step": whole,
        "ideal_sync_seconds": form * 8 / gbit / 1e9 if gbit is not None else None,
        "bytes_per_sync": {"kernel": kernel, "counted": None, "closed_form": form, "crossing": form},
    }


def _parameter_server(
    settings: Mapping[str, Any], gbit: float | None, runs: Sequence[Mapping[str, Any]], rows: Sequence[Row]
) -> list[Row]:
    """By the paper's accounting: a server with the same link receives all sub-networks, then sends the next ones."""
    limit = _of(rows, "none")
    if limit is None or gbit is None:
        return []
    subnet = [worker["subnet_bytes"] for run in runs if run["method"] == "none" for worker in run["workers"]]
    sync = 2 * sum(subnet) * 8 / gbit / 1e9
    return [
        limit
        | {
            "method": PARAMETER_SERVER,
            "measured": False,
            "sync_seconds": sync,
            "seconds_per_step": limit["compute_seconds"] + sync / settings["local_steps"],
            "bytes_per_sync": {"kernel": None, "counted": None, "closed_form": mean(subnet)},
            "peak_rss_bytes": None,
            "held_bytes": None,
        }
    ]


def _compare(rows: Sequence[Row]) -> None:
    """Add speed-ups, the share of the limit, and the ratio of a sync to the link's limit; in place."""
    compared = {"speed_up_over_ddp": "ddp", "speed_up_over_local_sgd": "local_sgd", "share_of_limit": "none"}
    for row in rows:
        for key, method in compared.items():
            base = _of(rows, method)
            row[key] = base["seconds_per_step"] / row["seconds_per_step"] if base else None
        row["sync_over_ideal"] = row["step_over_ideal"] = None
        ideal = row["ideal_sync_seconds"]
        if ideal:
            allowed = row["compute_seconds"] + ideal / row["local_steps"]
            row["step_over_ideal"] = row["seconds_per_step"] / allowed
            if row["method"] != "ddp":  # communication hidden by its backward pass is in no sync
                row["sync_over_ideal"] = row["sync_seconds"] / ideal


def _of(rows: Sequence[Row], method: str) -> Row | None:
    return next((row for row in rows if row["method"] == method), None)

"""The files of a run folder, and the one dictionary of results that is made of them.

``run.json`` (train.py), ``clock.json`` (Clock), ``resist_summary.json`` (RoundMonitor; only with rounds) and
``csv/metrics.csv`` go in; ``results.json`` comes out.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.app.clock import CLOCK_FILE
from resist_lightning.comm.byte_formulas import TRAINING_KINDS, ddp_bytes

RUN_FILE = "run.json"
SUMMARY_FILE = "resist_summary.json"
RESULTS_FILE = "results.json"
CURVES_FILE = "csv/metrics.csv"
REPORT_FILE = "report.txt"
FOLLOWED = ("training_ended.json", "evaluations/evaluations.jsonl", "evaluations/best.ckpt")  # of follow.py
PICTURES = ("accuracy.png", "partition.png", "timeline.png", "bytes.png")
HOLD_ALL = ("single", "ddp", "local_sgd")  # strategies whose workers hold the whole network


@dataclass(frozen=True)
class Curve:
    """A logged quantity over local steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def remove_results(folder: Path) -> None:
    """Remove what an earlier run has left in the folder: a run that does not write it anew would report it as its own."""
    for name in (RUN_FILE, SUMMARY_FILE, CLOCK_FILE, CURVES_FILE, RESULTS_FILE, REPORT_FILE, *PICTURES):
        (folder / name).unlink(missing_ok=True)
    for name in FOLLOWED:
        (folder / "checkpoints" / name).unlink(missing_ok=True)


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the main process's part of the results, with the versions and the machine."""
    stamped = {**run, "made_with": _made_with(), "overrides": _overrides(folder)}
    (folder / RUN_FILE).write_text(json.dumps(stamped, indent=1) + "\n")


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A file of the run folder, or None where the run did not write it."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def read_curves(folder: Path) -> dict[str, Curve]:
    """Everything in ``csv/metrics.csv``, by name; empty without the CSV logger."""
    path = folder / CURVES_FILE
    curves: dict[str, Curve] = {}
    if not path.exists():
        return curves
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    curve = curves.setdefault(name, Curve())
                    curve.steps.append(int(row["step"]))
                    curve.values.append(float(value))
    return curves


def collect(folder: Path) -> dict[str, Any]:
    """The results of a run."""
    run = read_json(folder, RUN_FILE)
    if run is None:
        raise ValueError(f"{folder} has no {RUN_FILE}: it is not the folder of a finished run of experiments/train.py")
    summary = read_json(folder, SUMMARY_FILE)
    clock = read_json(folder, CLOCK_FILE) or {}
    validation = read_curves(folder).get("val/acc", Curve())
    rounds = _rounds(summary)
    return {
        **{key: run[key] for key in ("strategy", "workers", "seed", "test", "checkpoint")},
        "validation": {"best_accuracy": max(validation.values, default=None)},
        "local_steps": summary["local_steps"] if summary else clock.get("steps"),
        "epochs": clock.get("epochs"),
        "rounds": rounds[0],
        "local_steps_per_round": rounds[1],
        "parameters": _parameters(run, summary),
        "stages": _stages(summary),
        "sent_bytes": _sent(run, summary, clock),
        "seconds": _seconds(run, summary, clock),
        "overrides": run["overrides"],
        "made_with": run["made_with"],
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")


def _rounds(summary: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """Number and length of the rounds; none where workers only run a handshake at the end of one."""
    if summary is None or summary["strategy"] == "auxnet":
        return None, None
    return summary["rounds"], summary["local_steps_per_round"]


def _stages(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The stages of a network, with the workers' metrics of the last complete round."""
    if summary is None or summary["strategy"] != "auxnet":
        return None
    method = summary["method"]
    last = method["rounds"][-1][1] if method.get("rounds") else {}  # a short run ends in its first round
    return {
        "names": summary["blocks"],
        "guess_bytes": max(method.get("guess_bytes", [0])),
        "mismatch": [value for name, value in sorted(last.items()) if name.startswith("auxnet/mismatch_")],
        "speedup_measured": last.get("auxnet/speedup_measured"),
        "speedup_predicted": last.get("auxnet/speedup_predicted"),
    }


def _parameters(run: Mapping[str, Any], summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters held; None where only the RoundMonitor, which the run did not have, could say."""
    full = run["full_parameters"]
    if summary is None and run["workers"] > 1 and run["strategy"] not in HOLD_ALL:
        return {"full": full, "held_by_one_worker": None, "held_share": None}
    held = summary["held_parameters_max"] if summary else full
    return {"full": full, "held_by_one_worker": held, "held_share": held / full}


def _sent(run: Mapping[str, Any], summary: Mapping[str, Any] | None, clock: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes sent by one worker in training, mean over workers, beside those of DDP and local SGD; None: unknown."""
    if summary is None:
        steps = clock.get("steps")
        by_closed_form = None if steps is None else ddp_bytes(run["gradient_bytes"], run["workers"], steps)
        sent = by_closed_form if run["strategy"] == "ddp" else None
        if run["workers"] == 1:
            sent = 0
        return {"measured": False, "training": sent, "ddp": by_closed_form, "local_sgd": None, "by_kind": {}}
    by_kind = {kind: sum(sent) / len(sent) for kind, sent in summary["sent_bytes"].items()}
    training = sum(by_kind.get(kind, 0) for kind in TRAINING_KINDS)
    return {
        "measured": True,
        "training": training,
        "ddp": summary["ddp_bytes"],
        "local_sgd": summary["local_sgd_bytes"],
        "ddp_ratio": _ratio(summary["ddp_bytes"], training),
        "local_sgd_ratio": _ratio(summary["local_sgd_bytes"], training),
        "by_kind": by_kind,
    }


def _seconds(run: Mapping[str, Any], summary: Mapping[str, Any] | None, clock: Mapping[str, Any]) -> dict[str, Any]:
    """Worker 0's seconds. Compute is the time in batches without the syncs."""
    sync = summary["seconds"]["sync"] if summary else None
    compute = summary["seconds"]["training"] - sync if summary and sync is not None else None
    return {
        "wall": run["wall_seconds"],
        "training": clock.get("training_seconds"),
        "validation": clock.get("validation_seconds"),
        "compute": compute,
        "sync": sync,
    }


def _ratio(other: float, own: float) -> float | None:
    return other / own if own else None


def _made_with() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "torchvision", "lightning")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    return {"python": platform.python_version(), **packages, "cpu_threads": threads, "gpu": gpu}


def _overrides(folder: Path) -> list[str]:
    path = folder / ".hydra" / "overrides.yaml"
    return [str(item) for item in OmegaConf.load(path)] if path.exists() else []

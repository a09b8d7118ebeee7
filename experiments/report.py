"""The table, ``results.json`` and the pictures of a run; train.py calls it, and it can be called again.

python experiments/report.py RUN_DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from experiments.app.bytes_figure import draw_bytes
from experiments.app.results import (
    REPORT_FILE,
    RESULTS_FILE,
    SUMMARY_FILE,
    collect,
    read_curves,
    read_json,
    write_results,
)
from experiments.app.run_figures import draw_accuracy, draw_neurons, draw_partition
from experiments.app.timeline_figure import draw_timeline
from experiments.harness.cli import fail
from experiments.harness.words import bytes_in_words, run_in_words, seconds_in_words

Row = tuple[str, str, str]  # quantity, its value in this run, and values to compare with
KINDS = {
    "shared": "shared", "hand_over": "hand-over", "merge": "merge", "state": "state", "boundary": "boundaries",
    "output": "outputs", "outer": "outer velocities",
}  # fmt: skip


def report(folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Write ``results.json``, ``report.txt`` and the PNGs of a finished run, and print the table; returns the results."""
    results = collect(folder)
    write_results(folder, results)
    curves, summary = read_curves(folder), read_json(folder, SUMMARY_FILE)
    drawn = [draw_accuracy(folder / "accuracy.png", curves, results)] if curves else []
    if summary and summary["strategy"] == "auxnet":
        if summary["method"].get("timeline"):
            drawn.append(draw_timeline(folder / "timeline.png", summary["method"]["timeline"], "A typical step"))
    elif summary and summary.get("neurons"):
        drawn.append(draw_neurons(folder / "partition.png", summary))
    elif summary and summary["blocks"]:
        drawn.append(draw_partition(folder / "partition.png", summary))
    if summary and summary["sent_by_round"] and summary["workers"] > 1:
        drawn.append(draw_bytes(folder / "bytes.png", summary))
    table = make_table(results)
    (console or Console()).print(table)
    # A file has no width of its own, and a terminal's would break its lines.
    with (folder / REPORT_FILE).open("w") as file:
        Console(file=file, width=110).print(table)
    written = ", ".join([RESULTS_FILE, REPORT_FILE, *(path.name for path in drawn)])
    (console or Console()).print(f"[dim]{folder}:[/dim] {written}", soft_wrap=True)
    return results


def make_table(results: Mapping[str, Any]) -> Table:
    """Accuracy, parameters held, bytes sent and time: measured values, and values to compare with."""
    table = Table(title=headline(results), title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("this run", justify="right")
    table.add_column("to compare")
    for rows in (_accuracy_rows, _parameter_rows, _stage_rows, _byte_rows, _time_rows):
        for row in rows(results):
            table.add_row(*row)
        table.add_section()
    return table


def headline(results: Mapping[str, Any]) -> str:
    """The run in one line: ``ResIST, 2 workers, 2000 local steps in 40 rounds of 50``."""
    words = run_in_words(results)
    if results["local_steps"] is not None:
        words += f", {results['local_steps']} local steps"
    if results["rounds"] is not None:
        words += f" in {results['rounds']} rounds of {results['local_steps_per_round']}"
    return words


def _accuracy_rows(results: Mapping[str, Any]) -> list[Row]:
    best = results["validation"]["best_accuracy"]
    looked = "" if best is None else f"best in validation {best:.2%}"
    return [
        ("test accuracy, full model", f"{results['test']['accuracy']:.2%}", looked),
        ("test loss", f"{results['test']['loss']:.4f}", ""),
    ]


def _parameter_rows(results: Mapping[str, Any]) -> list[Row]:
    counted = results["parameters"]
    held = ("-", unknown("round_monitor"))
    if counted["held_by_one_worker"] is not None:
        held = (f"{counted['held_by_one_worker']:,}", f"{counted['held_share']:.1%} of them")
    return [("parameters, full model", f"{counted['full']:,}", ""), ("held by one worker, at most", *held)]


def unknown(callback: str) -> str:
    """Why a quantity is missing."""
    return f"unknown without callbacks.{callback}"


def _stage_rows(results: Mapping[str, Any]) -> list[Row]:
    """Of a network in stages: the cuts, the mismatch of the guesses, and the speed-up."""
    found = results["stages"]
    if found is None:
        return []
    rows = [(f"stage {worker}", "", name) for worker, name in enumerate(found["names"])]
    if found["guess_bytes"]:
        held = bytes_in_words(found["guess_bytes"])
        rows.append(("held beside the stage, at most", held, "an auxiliary network, what is stored, or what is late"))
    for boundary, mismatch in enumerate(found["mismatch"], start=1):
        rows.append((f"guess {boundary} minus truth", f"{mismatch:.1%}", "of the truth, in norm, at the end"))
    if found["speedup_measured"] is not None:
        predicted = f"predicted {found['speedup_predicted']:.2f}x, from the seconds of this run"
        rows.append(("speed-up of steps that are not serial", f"{found['speedup_measured']:.2f}x", predicted))
    return rows


def _byte_rows(results: Mapping[str, Any]) -> list[Row]:
    sent = results["sent_bytes"]
    if sent["training"] is None:
        return [("sent by one worker", "-", unknown("clock" if results["strategy"] == "ddp" else "round_monitor"))]
    own = ("sent by one worker", bytes_in_words(sent["training"]))
    if results["workers"] == 1:
        return [(*own, "one worker talks to nobody")]
    if not sent["measured"]:
        return [(*own, "closed form, not measured")]
    if not sent["training"]:
        return [(*own, "no round was completed")]
    parts = [f"{word} {bytes_in_words(sent['by_kind'][k])}" for k, word in KINDS.items() if sent["by_kind"].get(k)]
    rows = [(*own, ", ".join(parts))]
    # Stages average nothing, so local SGD is no measure for them.
    averaging = [("local_sgd", "local SGD")] if results["rounds"] is not None else []
    for key, name in (*averaging, ("ddp", "DDP")):
        ratio = f"{sent[f'{key}_ratio']:.3g} times as much"
        rows.append((f"  {name} would have sent", bytes_in_words(sent[key]), ratio))
    aside = sum(sent["by_kind"].get(kind, 0) for kind in ("evaluation", "checkpoint", "start", "control"))
    rows.append(("to start, evaluate and save", bytes_in_words(aside), "not part of the training"))
    return rows


def _time_rows(results: Mapping[str, Any]) -> list[Row]:
    seconds = results["seconds"]
    rows = []
    if seconds["compute"] is not None:
        total = seconds["compute"] + seconds["sync"]
        words = ("steps, waiting included", "handshakes") if results["stages"] is not None else ("compute", "sync")
        for name, word in zip(("compute", "sync"), words, strict=True):
            share = f"{seconds[name] / total:.1%} of the time in batches" if total else ""
            rows.append((f"time in {word}", seconds_in_words(seconds[name]), share))
    if seconds["training"] is not None:
        looked = f"validating and saving {seconds_in_words(seconds['validation'])}"
        rows.append(("time in training", seconds_in_words(seconds["training"]), looked))
    rows.append(("wall time", seconds_in_words(seconds["wall"]), "with the start of the workers"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    try:
        report(parser.parse_args().run_dir)
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    main()

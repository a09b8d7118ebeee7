"""The table of the time to accuracy, from its result file: for the terminal and for README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.harness.record import read_record
from experiments.harness.tables import markdown
from experiments.links.networks import network_in_words
from experiments.links.tables import NOT_YET, WIDTH, bandwidth, machine, title

RESULTS = Path(__file__).parent / "results"


def reached(row: Mapping[str, Any], accuracy: float) -> float | None:
    """Seconds until a test accuracy was first seen; None if it never was."""
    found = (s for s, a in zip(row["seconds"], row["accuracy"], strict=True) if a >= accuracy)
    return next(found, None)


def target(rows: Sequence[Mapping[str, Any]]) -> float:
    """The accuracy that every method reached: the least of their best, rounded down to a whole per cent."""
    return int(100 * min(max(row["accuracy"]) for row in rows) + 1e-9) / 100


def header(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    goal = f"seconds to {target(rows):.0%}"
    return ["link", "method", "seconds of training", "sent by a worker", "last test accuracy", goal, "faster than DDP"]


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row per link and method; the goal is what all of them reached."""
    goal, made = target(rows), []
    for row in rows:
        same_link = [other for other in rows if other["bandwidth_gbit"] == row["bandwidth_gbit"]]
        base = next((reached(other, goal) for other in same_link if other["method"] == "ddp"), None)
        own = reached(row, goal)
        sent = row["kernel_sent_bytes"][-1]
        made.append(
            [
                bandwidth(row["bandwidth_gbit"]),
                title(row["method"]),
                f"{row['seconds'][-1]:.1f}",
                f"{sent / 1e6:,.1f} MB" if sent else "-",
                f"{100 * row['accuracy'][-1]:.1f} %",
                "-" if own is None else f"{own:.1f}",
                f"{base / own:.2f}x" if base and own else "-",
            ]
        )
    return made


def show(content: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table(title="Time to accuracy")
    for number, column in enumerate(header(content["rows"])):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in cells(content["rows"]):
        table.add_row(*row)
    (Console() if sys.stdout.isatty() else Console(width=WIDTH)).print(table)


def time_to_accuracy(folder: Path = RESULTS) -> str:
    path = folder / "time_to_accuracy.jsonl"
    if not path.exists():
        return NOT_YET
    rows = read_record(path)["rows"]
    return markdown(header(rows), cells(rows))


def time_to_accuracy_claim(folder: Path = RESULTS) -> str:
    """What was run, on what."""
    path = folder / "time_to_accuracy.jsonl"
    if not path.exists():
        return NOT_YET
    content = read_record(path)
    settings = content["settings"]
    of_each = "all" if settings["limit"] is None else f"{settings['limit']:,}"
    lines = [
        machine(content),
        f"{settings['workers']} workers of {settings['threads']} thread, n = 1 training of each method; "
        f"{network_in_words(settings['network'])}; {settings['steps']} local steps of batch "
        f"{settings['batch']} for every worker and method, {settings['local_steps']} of a round. Data: {settings['data']}, "
        f"{of_each} training {'images' if 'image' in settings['data'] else 'examples'} of each class.",
    ]
    return "".join(f"- {line}\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {table.__name__: table for table in (time_to_accuracy_claim, time_to_accuracy)}

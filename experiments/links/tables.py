"""The tables of the experiments on links, from their result files: for the terminal and for README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.harness.record import read_if_made
from experiments.harness.tables import markdown
from experiments.links.networks import network_in_words

RESULTS = Path(__file__).parent / "results"
WIDTH = 190
NOT_YET = "Not measured yet.\n"

TITLES = {
    "ddp": "DDP (Lightning's)",
    "local_sgd": "local SGD",
    "resist": "ResIST",
    "ist": "IST",
    "none": "no communication (the limit)",
    "parameter_server": "parameter server (computed)",
}
SPEED_HEADER = [
    "link", "method", "s per local step", "compute", "sync", "of it averaging", "hand-over", "packing",
    "faster than DDP", "than local SGD", "share of the limit", "sync / (bytes / bandwidth)",
]  # fmt: skip
BYTES_HEADER = [
    "link", "method", "local steps per sync", "sent per sync: kernel", "our count", "closed form", "kernel / count",
    "sent per local step", "held", "peak memory",
]  # fmt: skip

PARTS = ("averaging", "hand_over", "packing")

Cells = list[list[str]]


def title(method: str) -> str:
    """A method in words; ``resist_int8`` is ResIST, int8."""
    if method in TITLES:
        return TITLES[method]
    base, _, wire = method.rpartition("_")
    return f"{TITLES.get(base, base)}, {wire}"


def bandwidth(gbit: float | None) -> str:
    """A link in words."""
    return "unshaped" if gbit is None else f"{gbit:g} Gbit/s"


def speed_cells(rows: list[dict[str, Any]]) -> Cells:
    """Seconds: a row's step and its parts."""
    return [
        [
            bandwidth(row["bandwidth_gbit"]),
            title(row["method"]),
            _seconds(row["seconds_per_step"]),
            _seconds(row["compute_seconds"]),
            _seconds(row["sync_seconds"] / row["local_steps"]),
            *(_seconds(row["parts"][part] / row["local_steps"] if row["parts"] else None) for part in PARTS),
            _number(row["speed_up_over_ddp"], "x"),
            _number(row["speed_up_over_local_sgd"], "x"),
            _percent(row["share_of_limit"]),
            _number(row["sync_over_ideal"]),
        ]
        for row in rows
    ]


def bytes_cells(rows: list[dict[str, Any]]) -> Cells:
    """Bytes and memory: of one worker."""
    cells = []
    for row in rows:
        sent = row["bytes_per_sync"] or {"kernel": None, "counted": None, "closed_form": 0}
        basis = sent["counted"] or sent["closed_form"]
        cells.append(
            [
                bandwidth(row["bandwidth_gbit"]),
                title(row["method"]),
                str(row["local_steps"]) if basis else "-",
                _megabytes(sent["kernel"]),
                _megabytes(sent["counted"]),
                _megabytes(sent["closed_form"]),
                _number(sent["kernel"] / basis, digits=4) if sent["kernel"] and basis else "-",
                _megabytes(sent["closed_form"] / row["local_steps"]),
                _megabytes(row["held_bytes"]),
                _megabytes(row["peak_rss_bytes"]),
            ]
        )
    return cells


def show(content: Mapping[str, Any]) -> None:
    """Print both tables; where nobody's terminal limits the width, in full."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for name, header, cells in (
        ("Speed", SPEED_HEADER, speed_cells(content["rows"])),
        ("Bytes and memory of one worker", BYTES_HEADER, bytes_cells(content["rows"])),
    ):
        table = Table(title=name)
        for number, column in enumerate(header):
            table.add_column(column, justify="left" if number < 2 else "right")
        for row, after in zip(cells, [*cells[1:], [""]], strict=True):
            table.add_row(*row, end_section=row[0] != after[0])
        console.print(table)


def links_speed(folder: Path = RESULTS) -> str:
    content = record("links", folder)
    return markdown(SPEED_HEADER, speed_cells(content["rows"])) if content else NOT_YET


def links_claim(folder: Path = RESULTS) -> str:
    """The findings against the aims, for the rows that an aim speaks of."""
    content = record("links", folder)
    if not content:
        return NOT_YET
    rows = [row for row in content["rows"] if (row["bytes_per_sync"] or {}).get("counted")]
    equal = all(row["bytes_per_sync"]["counted"] == row["bytes_per_sync"]["closed_form"] for row in rows)
    extra = [row["bytes_per_sync"]["kernel"] / row["bytes_per_sync"]["counted"] - 1 for row in rows if has_kernel(row)]
    lines = [f"- {machine(content)}", f"- {work(content['settings'])}"]
    lines.append(f"- Our count of bytes {'equals' if equal else 'does NOT equal'} the closed form.")
    if extra:
        lines.append(f"- The kernel counted {100 * min(extra):.1f} to {100 * max(extra):.1f} % more than we.")
    for row in rows:
        if row["method"] in ("resist", "ist") and row["sync_over_ideal"]:
            lines.append(
                f"- {title(row['method'])} at {bandwidth(row['bandwidth_gbit'])}: a sync takes {row['sync_over_ideal']:.2f} of bytes / "
                f"bandwidth, a local step {row['step_over_ideal']:.2f} of what compute and link allow"
                f"{_against(row)}."
            )
    return "\n".join(lines) + "\n"


def _against(row: Mapping[str, Any]) -> str:
    found = [
        f"{row[key]:.2f} times as fast as {name}"
        for key, name in (("speed_up_over_ddp", "DDP"), ("speed_up_over_local_sgd", "local SGD"))
        if row[key]
    ]
    return f"; {' and '.join(found)}" if found else ""


def has_kernel(row: Mapping[str, Any]) -> bool:
    """Whether the kernel counted a worker's bytes."""
    return row["bytes_per_sync"]["kernel"] is not None


def machine(content: Mapping[str, Any]) -> str:
    """The hardware and the versions of a record, in words."""
    stamp = content["machine"]
    return (
        f"{stamp['cores']} CPU cores, {stamp['processor']}; torch {stamp['torch']}, Lightning {stamp['lightning']}, "
        f"Linux {stamp['kernel']}, TCP {stamp['tcp']}."
    )


def work(settings: Mapping[str, Any]) -> str:
    """What was run, in words."""
    return (
        f"{settings['workers']} workers of {settings['threads']} thread; {network_in_words(settings['network'])}, "
        f"batch {settings['batch']}. n = {settings['rounds']} syncs, each after "
        f"{settings['steps_per_round']} local steps that were really run; the table shows rounds of "
        f"{settings['local_steps']}. "
        f"DDP: {settings['ddp_steps']} steps."
    )


def links_bytes(folder: Path = RESULTS) -> str:
    content = record("links", folder)
    return markdown(BYTES_HEADER, bytes_cells(content["rows"])) if content else NOT_YET


def links_summary() -> str:
    """Seconds per local step of every method over every link, and how many times as fast as DDP."""
    content = record("links")
    if not content:
        return NOT_YET
    links = list(dict.fromkeys(row["bandwidth_gbit"] for row in content["rows"]))
    cells: dict[str, dict[float | None, str]] = {}
    sent: dict[str, str] = {}
    for row in content["rows"]:
        if row["method"] == "parameter_server":
            continue
        gain = "" if row["method"] in ("ddp", "none") else f" ({_number(row['speed_up_over_ddp'], 'x', 1)})"
        cells.setdefault(row["method"], {})[row["bandwidth_gbit"]] = f"{_seconds(row['seconds_per_step'])} s{gain}"
        found = row["bytes_per_sync"] or {"closed_form": 0}
        sent[row["method"]] = _megabytes(found["closed_form"] / row["local_steps"])
    rows = [[title(m), sent[m], *(by_link.get(link, "-") for link in links)] for m, by_link in cells.items()]
    return markdown(["", "sent per local step", *map(bandwidth, links)], rows)


def receives_first() -> str:
    """Seconds of an exchange, by how it is said to gloo."""
    content = record("receives_first")
    if not content:
        return NOT_YET
    ideal, ways = content["ideal_seconds"], content["seconds"]
    rows = [[f"`{name}`", f"{mean(values):.2f}", f"{mean(values) / ideal:.2f}"] for name, values in ways.items()]
    return markdown(["way", "seconds", "against bytes / bandwidth"], rows)


def record(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A result file; None where it has not been made."""
    return read_if_made(folder / f"{name}.jsonl")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.4f}"


def _number(value: float | None, unit: str = "", digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.2f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (links_claim, links_summary, links_speed, links_bytes, receives_first)
}

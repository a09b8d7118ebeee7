"""The tables of steps over links: seconds, the share of the exchange hidden behind computing, and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from experiments.auxnet.cases import TITLES, title
from experiments.harness.tables import Content, Grid, Row, Rows, chosen, grouped
from experiments.links.tables import bandwidth


def methods_of(rows: Rows, *before: str) -> Iterator[tuple[list[Any], Rows]]:
    """Method and schedule (after other keys) with their rows."""
    return grouped(rows, *before, "method", "schedule", titles=TITLES)


def by_link(rows: Rows) -> Iterator[tuple[float | None, Rows]]:
    """Rows of each bandwidth, the narrowest link first and unshaped links last."""
    found = {row["case"]["bandwidth_gbit"] for row in rows}
    for gbit in sorted(found, key=lambda one: float("inf") if one is None else one):
        yield gbit, chosen(rows, bandwidth_gbit=gbit)


def exchange_seconds(row: Row) -> float:
    """Seconds of a step's bytes, by formula, one direction after the other, over the row's link.

    The link is busy for this long where nothing is hidden: a gradient cannot be sent before the activation has arrived.
    """
    return float(sum(row["sent_by_formula"]) * 8 / (row["case"]["bandwidth_gbit"] * 1e9))


def pairs(rows: Rows, others: Rows) -> list[tuple[Row, Row]]:
    """Pairs of rows of the same turn, so that a temporary slow-down of the machine affects both."""
    of_turn = {row["case"]["seed"]: row for row in others}
    return [(row, of_turn[row["case"]["seed"]]) for row in rows if row["case"]["seed"] in of_turn]


def links(content: Content) -> Grid:
    """Steps over links: medians of seconds, of ratios and of differences over the turns."""
    lines = []
    for (task, method, schedule), own in methods_of(content["rows"], "task"):
        alone = chosen(content["rows"], task=task, method="serial")
        unshaped = chosen(own, bandwidth_gbit=None)
        for gbit, these in by_link(own):
            link = "none" if method == "serial" else bandwidth(gbit)
            cells = _exchange(these, unshaped) if gbit is not None else ["-"] * 4
            start = [task, title(method, schedule), link, *milliseconds(these, median)]
            lines.append([*start, _ratio(pairs(alone, these)), *cells, len(these)])
    header = ["network", "method", "link", "ms per step", "least to most", "speed-up over one process"]
    header += ["step / unshaped", "longer than unshaped, ms", "bytes / bandwidth, ms", "hidden"]
    return Grid("Steps over links", [*header, "n"], lines)


def link_bytes(content: Content) -> Grid:
    """Bytes at the boundary, both directions together."""
    lines = []
    rows = [row for row in content["rows"] if row["case"]["method"] != "serial"]
    for (task, method, schedule), own in methods_of(rows, "task"):
        for gbit, these in by_link(own):
            formula = sum(these[0]["sent_by_formula"])
            counted, kernel = (_sums(these, key) for key in ("sent_by_step", "kernel_sent_by_step"))
            cells = [f"{median(counted):,.0f}"] if counted else ["-"]
            cells += [f"{median(kernel):,.0f}", f"{median(kernel) / formula:.4f}"] if kernel else ["-", "-"]
            lines.append([task, title(method, schedule), bandwidth(gbit), f"{formula:,}", *cells])
    header = ["network", "method", "link", "bytes per step, by formula", "our count", "the kernel's"]
    return Grid("Bytes across the boundary", [*header, "kernel / formula"], lines)


def milliseconds(rows: Rows, middle: Callable[[list[float]], float]) -> list[str]:
    """Milliseconds of a step, as cells: their mean or median, and their range."""
    found = [1000 * row["step_seconds"] for row in rows]
    return [f"{middle(found):.1f}", f"{min(found):.1f} to {max(found):.1f}"]


def _exchange(rows: Rows, unshaped: Rows) -> list[str]:
    """The cost of the link, as cells."""
    found, ideal = pairs(rows, unshaped), exchange_seconds(rows[0])
    if not found:
        return ["-", "-", f"{1000 * ideal:.1f}", "-"]
    longer = median(row["step_seconds"] - other["step_seconds"] for row, other in found)
    return [_ratio(found), f"{1000 * longer:.1f}", f"{1000 * ideal:.1f}", f"{100 * (1 - longer / ideal):.0f} %"]


def _ratio(found: list[tuple[Row, Row]]) -> str:
    return f"{median(one['step_seconds'] / other['step_seconds'] for one, other in found):.2f}" if found else "-"


def _sums(rows: Rows, key: str) -> list[float]:
    """Sums over all workers, where each of them has counted."""
    return [sum(row[key]) for row in rows if None not in row[key]]


MADE = (links, link_bytes)

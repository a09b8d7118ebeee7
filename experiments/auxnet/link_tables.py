"""The tables of steps over links: seconds, what of the exchange is hidden behind computing, and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from experiments.accuracy.tables import Rows, chosen, distinct, spread
from experiments.auxnet.words import TITLES, title
from experiments.links.tables import bandwidth
from experiments.paper_tables.tables import Grid

Content = dict[str, Any]


def methods_of(rows: Rows) -> Iterator[tuple[str, str, Rows]]:
    """Network, method in words, and their rows, in the order of the tables."""
    for task in distinct(rows, "task"):
        for method in TITLES:
            own = chosen(rows, task=task, method=method)
            for schedule in distinct(own, "schedule"):
                yield task, title(method, schedule), chosen(own, schedule=schedule)


def by_link(rows: Rows) -> Iterator[tuple[float | None, Rows]]:
    """Rows of each bandwidth, the narrowest link first and unshaped links last."""
    found = {row["case"]["bandwidth_gbit"] for row in rows}
    for gbit in sorted(found, key=lambda one: float("inf") if one is None else one):
        yield gbit, chosen(rows, bandwidth_gbit=gbit)


def exchange_seconds(row: dict[str, Any]) -> float:
    """Of a step's bytes, by formula, one direction after the other, over the row's link: as long as back-propagation,
    which needs an activation before it has a gradient, must wait for them."""
    return float(sum(row["sent_by_formula"]) * 8 / (row["case"]["bandwidth_gbit"] * 1e9))


def pairs(rows: Rows, others: Rows) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows with those of the same turn, so that what slows the machine for a while slows both."""
    of_turn = {row["case"]["seed"]: row for row in others}
    for row in rows:
        if row["case"]["seed"] in of_turn:
            yield row, of_turn[row["case"]["seed"]]


def links(content: Content) -> Grid:
    rows, lines = content["rows"], []
    for task, method, own in methods_of(rows):
        alone, unshaped = chosen(rows, task=task, method="serial"), chosen(own, bandwidth_gbit=None)
        for gbit, these in by_link(own):
            serial = these[0]["case"]["workers"] == 1
            milliseconds = [1000 * row["step_seconds"] for row in these]
            lines.append(
                [
                    task,
                    method,
                    "no link" if serial else bandwidth(gbit),
                    f"{median(milliseconds):.1f}",
                    f"{min(milliseconds):.1f} to {max(milliseconds):.1f}",
                    _ratio(pairs(alone, these)),
                    *(["-", "-", "-", "-"] if gbit is None else _exchange(these, unshaped)),
                    str(len(these)),
                ]
            )
    header = ["network", "method", "link", "ms per step", "least to most", "speed-up over one process"]
    header += ["step / unshaped step", "more than unshaped, ms", "bytes / bandwidth, ms", "hidden"]
    return Grid("Steps over links", [*header, "n"], lines)


def link_bytes(content: Content) -> Grid:
    """At the boundary, both directions together."""
    lines = []
    for task, method, own in methods_of(content["rows"]):
        if own[0]["case"]["workers"] == 1:
            continue
        for gbit, these in by_link(own):
            formula = sum(these[0]["sent_by_formula"])
            kernel, counted = (_sums(these, key) for key in ("kernel_sent_by_step", "sent_by_step"))
            lines.append(
                [
                    task,
                    method,
                    bandwidth(gbit),
                    f"{formula:,}",
                    spread(counted) if len(set(counted)) > 1 else f"{counted[0]:,.0f}" if counted else "-",
                    f"{median(kernel):,.0f}" if kernel else "-",
                    f"{median(kernel) / formula:.4f}" if kernel else "-",
                ]
            )
    header = ["network", "method", "link", "bytes per step: by formula", "our count", "kernel", "kernel / formula"]
    return Grid("Bytes across the boundary", header, lines)


def _sums(rows: Rows, key: str) -> list[float]:
    """Of all workers, where each of them has counted."""
    return [sum(row[key]) for row in rows if None not in row[key]]


def _exchange(rows: Rows, unshaped: Rows) -> list[str]:
    """What the link costs, as cells: medians over the turns."""
    found = list(pairs(rows, unshaped))
    ideal = exchange_seconds(rows[0])
    if not found:
        return ["-", "-", f"{1000 * ideal:.1f}", "-"]
    more = median(row["step_seconds"] - other["step_seconds"] for row, other in found)
    return [_ratio(iter(found)), f"{1000 * more:.1f}", f"{1000 * ideal:.1f}", f"{100 * (1 - more / ideal):.0f} %"]


def _ratio(found: Iterator[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    ratios = [one["step_seconds"] / other["step_seconds"] for one, other in found]
    return f"{median(ratios):.2f}" if ratios else "-"

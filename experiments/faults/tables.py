"""The tables of the soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.faults.faults import KINDS, PLACES
from experiments.harness.tables import Content, Grid, page_tables

RESULTS = Path(__file__).parent / "results"
Rows = Sequence[Mapping[str, Any]]


def count(rows: Rows, finding: str) -> int:
    """Number of runs with findings of a kind."""
    return sum(any(found.startswith(finding) for found in row["findings"]) for row in rows)


def numbers(rows: Rows) -> list[str]:
    """Some runs as the cells of a line, under `HEADER`."""
    kinds = ("hang", "wrong continuation", "left over", "half-written")
    others = [row for row in rows if any(not found.startswith(kinds) for found in row["findings"])]
    return [
        str(len(rows)),
        str(count(rows, "hang")),
        str(count(rows, "wrong continuation")),
        str(sum(row["left_over"] for row in rows)),
        str(sum(row["half_written"] for row in rows)),
        str(len(others)),
        *_median_and_most(rows, "seconds"),
        *_median_and_most(rows, "lost_steps"),
    ]


def _median_and_most(rows: Rows, key: str) -> tuple[str, str]:
    found = [row[key] for row in rows if row[key] is not None]
    if not found:
        return "-", "-"
    median_text, most = (f"{value:.1f}".removesuffix(".0") for value in (median(found), max(found)))
    return median_text, most


HEADER = [
    "runs", "hangs", "wrong continuations", "processes left", "half-written files", "other findings",
    "seconds to the end of the last survivor: median", "most", "local steps lost: median", "most",
]  # fmt: skip


def by_kind(rows: Rows) -> list[tuple[str, Rows]]:
    """The kinds that occur, with their runs."""
    found = [(kind, [row for row in rows if row["kind"] == kind]) for kind in KINDS]
    return [(kind, own) for kind, own in found if own]


def line(row: Mapping[str, Any]) -> str:
    """A run in one line, and its findings in lines of their own."""
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f} s"
    head = f"{row['fault']}, {row['face']}, {row['workers']} workers, {row['launcher']}: {seconds}"
    return "".join([head, *(f"\n    {finding}" for finding in row["findings"])])


OF_EACH = ("seed", "number", "minutes", "output")  # settings in which the records may differ


def joined(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A single record of all faults, in the order of the records."""
    first = contents[0]
    for other in contents[1:]:
        for key in ("machine", "settings"):
            differing = {
                name
                for name in first[key].keys() | other[key].keys()
                if first[key].get(name) != other[key].get(name) and name not in OF_EACH
            }
            if differing:
                raise ValueError(f"records with different {', '.join(sorted(differing))} cannot be joined.")
    seeds = [content["settings"]["seed"] for content in contents]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds}: the same faults would be counted twice; join records with different seeds.")
    rows = [row for content in contents for row in content["rows"]]
    return {
        **first,
        "settings": {**first["settings"], "seed": seeds},
        "at_a_time": len(contents),
        "seconds": max(content["seconds"] for content in contents),
        "rows": rows,
    }


def faults_claim(content: Content) -> str:
    """The cases, the settings and the machine, in words."""
    stamp = content["machine"]
    settings = content["settings"]
    rows = content["rows"]
    launchers = Counter(row["launcher"] for row in rows)
    launched = ", ".join(f"{many} {name}" for name, many in launchers.items())
    seeds, at_a_time = settings["seed"], content.get("at_a_time", 1)
    seeds = ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds
    return (
        f"- {stamp['processor']}, {stamp['cores']} cores, Python {stamp['python']}, torch {stamp['torch']}, Lightning "
        f"{stamp['lightning']}.\n"
        f"- {len(rows)} faults ({launched}; {count(rows, 'not tried')} did not strike) in {content['seconds'] / 60:.0f} minutes, "
        f"{'up to ' * (at_a_time > 1)}{at_a_time} training{'s' * (at_a_time > 1)} at a time, of 2 to 4 workers; seed {seeds}; "
        f"timeout {settings['timeout_seconds']:g} s, silence {settings['silence_seconds']:g} s.\n"
    )


def faults_by_kind(content: Content) -> Grid:
    groups = [*by_kind(content["rows"]), ("all", content["rows"])]
    return Grid("Faults", ["fault", *HEADER], [[kind, *numbers(rows)] for kind, rows in groups])


def faults_by_place(content: Content) -> Grid:
    """Runs and the median of the seconds, of each kind at each place."""
    lines = []
    for kind, rows in by_kind(content["rows"]):
        cells = [kind]
        for place in PLACES:
            here = [row for row in rows if row["place"] == place]
            cells.append(f"{len(here)}: {_median_and_most(here, 'seconds')[0]} s" if here else "")
        lines.append(cells)
    return Grid("Faults by place", ["fault", *PLACES], lines)


def faults_findings(content: Content) -> Grid | str:
    """Every run with findings."""
    found = [
        [f"`{row['fault']}`, {row['launcher']}", "; ".join(row["findings"])]
        for row in content["rows"]
        if row["findings"]
    ]
    return Grid("Findings", ["fault", "found"], found) if found else "Nothing was found.\n"


STUDIES = {"faults": (faults_claim, faults_by_kind, faults_by_place, faults_findings)}
TABLES = page_tables(RESULTS, STUDIES)

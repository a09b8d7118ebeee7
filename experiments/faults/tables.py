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
    """Runs in which something of a kind was found."""
    return sum(any(found.startswith(finding) for found in row["findings"]) for row in rows)


def numbers(rows: Rows) -> dict[str, Any]:
    """What is to be known of some runs."""
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    lost = [row["lost_steps"] for row in rows if row["lost_steps"] is not None]
    return {
        "faults": len(rows),
        "hangs": count(rows, "hang"),
        "wrong_continuations": count(rows, "wrong continuation"),
        "left_over": sum(row["left_over"] for row in rows),
        "half_written": sum(row["half_written"] for row in rows),
        "other_findings": sum(
            any(not found.startswith(("hang", "wrong continuation", "left over", "half-written")) for found in row["findings"])
            for row in rows
        ),
        "seconds_median": median(seconds) if seconds else None,
        "seconds_max": max(seconds, default=None),
        "lost_steps_median": median(lost) if lost else None,
        "lost_steps_max": max(lost, default=None),
    }  # fmt: skip


def summary(rows: Rows) -> dict[str, Any]:
    """Numbers of all runs, and by kind, by place and by launcher; and how often each thing was found."""
    found: dict[str, Any] = {"all": numbers(rows)}
    for key in ("kind", "place", "launcher", "face"):
        values = dict.fromkeys(row[key] for row in rows)
        found[f"by_{key}"] = {value: numbers([row for row in rows if row[key] == value]) for value in values}
    found["findings"] = dict(Counter(text.partition(":")[0] for row in rows for text in row["findings"]))
    return found


HEADER = [
    "fault", "runs", "hangs", "wrong continuations", "processes left", "half-written files", "other findings",
    "seconds to the end of the last survivor: median", "most", "local steps lost: median", "most",
]  # fmt: skip


def cells(rows: Rows) -> list[list[str]]:
    """A line for every kind, and one for all."""
    made = []
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]:
        made.append([kind, *_texts(numbers([row for row in rows if row["kind"] == kind]))])
    return [*made, ["all", *_texts(numbers(rows))]]


def place_cells(rows: Rows) -> list[list[str]]:
    """Runs and the median of the seconds, of each kind at each place."""
    made = []
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]:
        texts = []
        for place in PLACES:
            here = numbers([row for row in rows if (row["kind"], row["place"]) == (kind, place)])
            texts.append(f"{here['faults']}: {_number(here['seconds_median'])} s" if here["faults"] else "")
        made.append([kind, *texts])
    return made


def line(row: Mapping[str, Any]) -> str:
    """A run in one line, and what was found in lines of its own."""
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f} s"
    head = f"{row['fault']}, {row['face']}, {row['workers']} workers, {row['launcher']}: {seconds}"
    return "".join([head, *(f"\n    {finding}" for finding in row["findings"])])


def _texts(of: Mapping[str, Any]) -> list[str]:
    counts = [str(of[key]) for key in HEADER_KEYS]
    ends = ("seconds_median", "seconds_max", "lost_steps_median", "lost_steps_max")
    return [*counts, *(_number(of[key]) for key in ends)]


HEADER_KEYS = ("faults", "hangs", "wrong_continuations", "left_over", "half_written", "other_findings")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}".removesuffix(".0")


OF_EACH = ("seed", "number", "minutes", "output")
"""Settings in which the records may differ."""


def joined(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of all faults, in the order of the records."""
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
        raise ValueError(f"seeds {seeds}: the same faults would count twice; join records with different seeds.")
    rows = [row for content in contents for row in content["rows"]]
    return {
        **first,
        "settings": {**first["settings"], "seed": seeds},
        "at_a_time": len(contents),
        "seconds": max(content["seconds"] for content in contents),
        "rows": rows,
    }


def faults_claim(content: Content) -> str:
    """What was run, on what."""
    stamp, settings, all_ = content["machine"], content["settings"], content["summary"]["all"]
    launchers = ", ".join(f"{of['faults']} {name}" for name, of in content["summary"]["by_launcher"].items())
    seeds, at_a_time = settings["seed"], content.get("at_a_time", 1)
    seeds = ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds
    untried = count(content["rows"], "not tried")
    return (
        f"- {stamp['processor']}, {stamp['cores']} cores, Python {stamp['python']}, torch {stamp['torch']}, Lightning "
        f"{stamp['lightning']}.\n"
        f"- {all_['faults']} faults ({launchers}; {untried} did not strike) in {content['seconds'] / 60:.0f} minutes, "
        f"{'up to ' * (at_a_time > 1)}{at_a_time} training{'s' * (at_a_time > 1)} at a time, of 2 to 4 workers; seed {seeds}; "
        f"timeout {settings['timeout_seconds']:g} s, silence {settings['silence_seconds']:g} s.\n"
    )


def faults_by_kind(content: Content) -> Grid:
    return Grid("Faults", HEADER, cells(content["rows"]))


def faults_by_place(content: Content) -> Grid:
    return Grid("Faults by place", ["fault", *PLACES], place_cells(content["rows"]))


def faults_findings(content: Content) -> Grid | str:
    """Every run in which something was found."""
    found = [
        [f"`{row['fault']}`, {row['launcher']}", "; ".join(row["findings"])]
        for row in content["rows"]
        if row["findings"]
    ]
    return Grid("Findings", ["fault", "found"], found) if found else "Nothing was found.\n"


def faults_picture(content: Content) -> str:
    """The picture, where there is one."""
    return "![seconds from the fault to the end of the last survivor, by kind and place](results/faults.png)\n"


STUDIES = {"faults": (faults_claim, faults_by_kind, faults_by_place, faults_findings, faults_picture)}
TABLES = page_tables(RESULTS, STUDIES)

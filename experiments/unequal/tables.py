"""The table of the unequal workers, from its result files: for the terminal and for README.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.harness.record import read_record
from experiments.harness.tables import markdown

RESULTS = Path(__file__).parent / "results"


def records(folder: Path) -> list[dict[str, Any]]:
    """The result files of a folder, by number of workers."""
    found = [read_record(path) for path in folder.glob("unequal_*.jsonl")]
    return sorted(found, key=lambda content: content["settings"]["workers"])


def chosen(content: Mapping[str, Any], shares: str) -> list[dict[str, Any]]:
    """The trainings with these shares."""
    return [row for row in content["rows"] if row["shares"] == shares]


def round_seconds(content: Mapping[str, Any], shares: str) -> float:
    """Median seconds of a round."""
    return median(seconds for row in chosen(content, shares) for seconds in row["round_seconds"])


def ratios(content: Mapping[str, Any]) -> list[float]:
    """How many times shorter a round was, in each turn."""
    pairs = zip(chosen(content, "equal"), chosen(content, "auto"), strict=True)
    return [median(equal["round_seconds"]) / median(auto["round_seconds"]) for equal, auto in pairs]


def table(contents: Sequence[Mapping[str, Any]]) -> str:
    """One row per number of workers; of several turns the median, with the least and the most."""
    header = [
        "workers, cores of each", "blocks: equal", "blocks: auto", "seconds per round: equal", "auto",
        "times as fast (each turn)", "predicted", "at most, with min_blocks",
    ]  # fmt: skip
    rows = []
    for content in contents:
        auto, found = chosen(content, "auto"), ratios(content)
        rows.append(
            [
                f"{content['settings']['workers']}: " + ", ".join(f"{c:.2g}" for c in content["settings"]["cores"]),
                _different(chosen(content, "equal")),
                _different(auto),
                f"{round_seconds(content, 'equal'):.2f}",
                f"{round_seconds(content, 'auto'):.2f}",
                f"{median(found):.2f}x ({', '.join(f'{ratio:.2f}' for ratio in found)})",
                f"{median(row['predicted'] for row in auto):.2f}x",
                f"{median(row['bound'] for row in auto):.2f}x",
            ]
        )
    return markdown(header, rows)


def _different(rows: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(", ".join(map(str, row["blocks"])) for row in rows))


def unequal() -> str:
    return table(records(RESULTS))


def unequal_claim() -> str:
    """What was run, on what."""
    lines = []
    for content in records(RESULTS):
        machine, settings = content["machine"], content["settings"]
        lines.append(
            f"{settings['workers']} workers on {machine['cores']} CPU cores, {machine['processor']}, torch "
            f"{machine['torch']}; PreActResNet with sections {settings['sections']}, width x {settings['width']:g}; "
            f"rounds of {settings['local_steps']} local steps of batch {settings['batch']}, min_blocks="
            f"{settings['min_blocks']}; n = {settings['turns']} turns of {settings['rounds']} rounds."
        )
    return "".join(f"- {line}\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {table.__name__: table for table in (unequal_claim, unequal)}

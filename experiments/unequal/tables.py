"""The table of the unequal workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from experiments.harness.record import read_record
from experiments.harness.tables import Content, Grid, Rows

RESULTS = Path(__file__).parent / "results"


def records(folder: Path) -> list[Content]:
    """The result files of a folder, by number of workers."""
    found = [read_record(path) for path in folder.glob("unequal_*.jsonl")]
    return sorted(found, key=lambda content: content["settings"]["workers"])


def chosen(content: Content, shares: str) -> Rows:
    """The trainings with these shares."""
    return [row for row in content["rows"] if row["shares"] == shares]


def round_seconds(content: Content, shares: str) -> float:
    """Median seconds of a round."""
    return median(seconds for row in chosen(content, shares) for seconds in row["round_seconds"])


def ratios(content: Content) -> list[float]:
    """The factor by which a round was shorter, in each turn."""
    pairs = zip(chosen(content, "equal"), chosen(content, "auto"), strict=True)
    return [median(equal["round_seconds"]) / median(auto["round_seconds"]) for equal, auto in pairs]


def _blocks(rows: Rows) -> str:
    return "; ".join(dict.fromkeys(", ".join(map(str, row["blocks"])) for row in rows))


def compared(contents: Sequence[Content]) -> Grid:
    """A row per number of workers; of several turns the median, with the least and the most."""

    def cores(content: Content) -> str:
        return f"{content['settings']['workers']}: " + ", ".join(f"{c:.2g}" for c in content["settings"]["cores"])

    def fast(content: Content) -> str:
        found = ratios(content)
        return f"{median(found):.2f}x ({', '.join(f'{ratio:.2f}' for ratio in found)})"

    return Grid.of("Unequal workers", contents, {
        "workers, cores of each": cores,
        "blocks: equal": lambda content: _blocks(chosen(content, "equal")),
        "blocks: auto": lambda content: _blocks(chosen(content, "auto")),
        "seconds per round: equal": lambda content: f"{round_seconds(content, 'equal'):.2f}",
        "auto": lambda content: f"{round_seconds(content, 'auto'):.2f}",
        "times as fast (each turn)": fast,
        "predicted": lambda content: f"{median(row['predicted'] for row in chosen(content, 'auto')):.2f}x",
        "at most, with min_blocks": lambda content: f"{median(row['bound'] for row in chosen(content, 'auto')):.2f}x",
    })  # fmt: skip


def unequal() -> str:
    return compared(records(RESULTS)).markdown()


def unequal_claim() -> str:
    """The conditions of the trainings, in words."""
    lines = []
    for content in records(RESULTS):
        machine, settings = content["machine"], content["settings"]
        lines.append(
            f"- {settings['workers']} workers on {machine['cores']} CPU cores, {machine['processor']}, torch "
            f"{machine['torch']}; PreActResNet with sections {settings['sections']}, width x {settings['width']:g}; "
            f"rounds of {settings['local_steps']} local steps of batch {settings['batch']}, min_blocks="
            f"{settings['min_blocks']}; n = {settings['turns']} turns of {settings['rounds']} rounds.\n"
        )
    return "".join(lines)


TABLES = {table.__name__: table for table in (unequal_claim, unequal)}

"""The table of the elastic training: the costs of losing a host and taking it back."""

from __future__ import annotations

from pathlib import Path

from experiments.harness.tables import Content, Grid, page_tables

RESULTS = Path(__file__).parent / "results"


def elastic(content: Content) -> Grid:
    changes = [("a host is lost", content["lost"]), ("it comes back", content["back"])]
    return Grid.of("Elastic", changes, {
        "": lambda change: change[0],
        "workers then": lambda change: change[1]["workers"],
        "until they train": lambda change: f"{change[1]['seconds_until_training']:.1f} s",
        "without any training": lambda change: f"{change[1]['seconds_without_training']:.1f} s",
        "local steps lost": lambda change: change[1]["steps_lost"],
    })  # fmt: skip


STUDIES = {"elastic": (elastic,)}
TABLES = page_tables(RESULTS, STUDIES)

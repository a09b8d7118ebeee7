"""The table of the experiment, from its result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.harness.record import read_record
from experiments.harness.tables import markdown

RECORD = Path(__file__).parent / "results" / "elastic.jsonl"


def table() -> str:
    if not RECORD.exists():
        return "Not measured yet.\n"
    record: dict[str, Any] = read_record(RECORD)
    rows = [
        [
            what,
            str(record[key]["workers"]),
            f"{record[key]['seconds_until_training']:.1f} s",
            f"{record[key]['seconds_without_training']:.1f} s",
            str(record[key]["steps_lost"]),
        ]
        for what, key in (("a host is lost", "lost"), ("it comes back", "back"))
    ]
    head = ["", "workers then", "until they train", "without any training", "local steps lost"]
    return markdown(head, rows)


TABLES = {"elastic": table}

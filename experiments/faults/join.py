"""Joins the records of soaks that ran side by side, with different seeds, into one.

python experiments/faults/join.py runs/a/faults.jsonl runs/b/faults.jsonl output=experiments/faults/results
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.faults import tables
from experiments.harness.record import as_lines, read_record

OF_EACH = ("seed", "number", "minutes", "output")
"""Settings in which the records may differ."""


def joined(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of all faults, in the order of the records.

    Raises:
        ValueError: if they are of different machines or settings, or of the same faults.
    """
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
        "summary": tables.summary(rows),
    }


def main() -> None:
    from experiments.faults.plot import draw_seconds

    *paths, output = sys.argv[1:]
    content = joined([read_record(Path(path)) for path in paths])
    path = Path(output.removeprefix("output=")) / "faults.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_lines(content))
    tables.show(content)
    print(f"wrote {path}, {draw_seconds(path.with_suffix('.png'), content)}")


if __name__ == "__main__":
    main()

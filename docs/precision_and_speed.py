"""Writes the table of docs/precision-and-speed.md from trainings: python -m docs.precision_and_speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from docs.table import rows_of, write_table
from tests.helpers.speedup_settings import CELLS, METHODS, SETTINGS
from tests.helpers.speedups import Found, train_all

PAGE = Path(__file__).with_name("precision-and-speed.md")
HEADER = f"| setting | {' | '.join(METHODS)} | note |"


def main() -> None:
    """Train all cells, and write the table."""
    trained = train_all(CELLS)
    write_table(
        PAGE, HEADER, [row(name, {m: trained[name, m][0] for m in SETTINGS[name].methods}) for name in SETTINGS]
    )


def row(name: str, found: Mapping[str, Found]) -> str:
    """The row of one setting: what worker 0 found, by method."""
    setting = SETTINGS[name]
    cells = [setting.says]
    for method in METHODS:
        cells.append(_cell(found[method]) if method in found else setting.otherwise.get(method, "not tried"))
    return f"| {' | '.join([*cells, setting.condition])} |"


def rows() -> dict[str, str]:
    """The rows of the page by setting."""
    return rows_of(PAGE)


def _cell(found: Found) -> str:
    if not found.checked:
        return "lost"
    made = found.compiled
    if not made.graphs:
        return "works"
    return (
        f"works: {made.operations} operations in {made.graphs} graph{'s' * (made.graphs > 1)}, {made.breaks} breaks, "
        f"{made.later} recompiled later"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

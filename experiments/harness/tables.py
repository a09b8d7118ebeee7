"""Writes the tables of README.md and of the experiments' pages from their result files.

python experiments/harness/tables.py

A page has places for tables, `<!-- table: NAME -->` to `<!-- end of table -->`; the folder of an experiment has a `tables.py`
with TABLES: a function for each name that gives the text. tests/docs compares the pages with the result files.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "experiments").glob("*/tables.py") if path.parent.name != "harness")
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md", *(folder / "README.md" for folder in FOLDERS))
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def all_tables() -> dict[str, Callable[[], str]]:
    """The tables of all experiments, by name."""
    found: dict[str, Callable[[], str]] = {}
    for folder in FOLDERS:
        tables = importlib.import_module(f"experiments.{folder.name}.tables").TABLES
        assert not found.keys() & tables.keys(), f"{folder.name} has a table with the name of another one"
        found |= tables
    return found


def filled(text: str) -> str:
    """The page with its tables made anew."""
    tables = all_tables()
    return PLACE.sub(lambda place: place[1] + tables[place[2]]() + place[3], text)


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if filled(text) != text:
            page.write_text(filled(text))
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

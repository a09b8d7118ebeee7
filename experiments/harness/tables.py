"""Tables of the experiments: made from their result files, shown on the screen, and written into the pages.

python experiments/harness/tables.py

A page has places for tables, `<!-- table: NAME -->` to `<!-- end of table -->`; the folder of an experiment has a `tables.py`
with TABLES: a function for each name that gives the text. tests/docs compares the pages with the result files.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from experiments.harness.record import read_record

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "experiments").glob("*/tables.py") if path.parent.name != "harness")
OWN_PAGES = [page for folder in FOLDERS if (page := folder / "README.md").exists()]
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md", ROOT / "docs" / "choosing.md", *OWN_PAGES)
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NOT_YET = "Not measured yet.\n"
WIDE = 190  # characters in a line of a file or pipe, which has no width of its own

Content = dict[str, Any]
Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    @classmethod
    def of(cls, title: str, rows: Iterable[Any], columns: Mapping[str, Callable[[Any], object]]) -> Grid:
        """A line for each row; a column has a header and gives the cell of a row."""
        return cls(title, list(columns), [[cell(row) for cell in columns.values()] for row in rows])

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)

    def show(self) -> None:
        """Print it."""
        table = Table(*self.header, title=self.title, title_justify="left", title_style="bold")
        for row in self.rows:
            table.add_row(*map(str, row))
        Console(width=None if sys.stdout.isatty() else WIDE).print(table)


Make = Callable[[Content], "Grid | str"]
Studies = Mapping[str, Sequence[Make]]  # for each result file, its tables and lines of text


def read(folder: Path, name: str) -> Content | None:
    """A result file; None if there is none, or no row in it."""
    path = folder / f"{name}.jsonl"
    content = read_record(path) if path.exists() else {}
    return content if content and content.get("rows", True) else None


def page_tables(folder: Path, studies: Studies, prefix: str = "") -> dict[str, Callable[[], str]]:
    """The TABLES of an experiment: by the name of the function that makes each."""
    return {
        prefix + make.__name__: partial(_text, folder, name, make) for name, makes in studies.items() for make in makes
    }


def _text(folder: Path, name: str, make: Make) -> str:
    content = read(folder, name)
    made = NOT_YET if content is None else make(content)
    return made.markdown() if isinstance(made, Grid) else made


def show(folder: Path, studies: Studies, names: Iterable[str]) -> None:
    """Print the tables of some result files, as far as they have been made."""
    for name in names:
        content = read(folder, name)
        for make in studies[name] if content else ():
            made = make(content or {})
            if isinstance(made, Grid):
                made.show()
            else:
                print(made)


def show_and_write(out: Path, results: Path, studies: Studies, names: Iterable[str], drawn: Iterable[Path]) -> None:
    """The end of a command: shows tables and names of pictures, and fills the pages if they show `out`."""
    show(out, studies, names)
    for path in drawn:
        print(f"wrote {path}")
    if out.resolve() == results.resolve():
        main()


def chosen(rows: Rows, **wanted: Any) -> Rows:
    """Rows whose case has these values."""
    return [row for row in rows if all(row["case"][key] == value for key, value in wanted.items())]


def distinct(rows: Rows, key: str) -> list[Any]:
    """Values of ``key`` in the cases, in the order of their first appearance, numbers sorted."""
    found = list(dict.fromkeys(row["case"][key] for row in rows))
    # True and false are numbers to Python, and have no order that a reader would expect.
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
    return sorted(found) if numbers else found


def grouped(rows: Rows, *keys: str, titles: Iterable[str] = ()) -> Iterator[tuple[list[Any], Rows]]:
    """For all values of these keys in the cases, the values and the rows; methods come in the order of the titles."""
    if not keys:
        yield [], rows
        return
    key, rest = keys[0], keys[1:]
    found = distinct(rows, key)
    if key == "method":
        found = [method for method in titles if method in found]
    for value in found:
        for values, own in grouped(chosen(rows, **{key: value}), *rest, titles=titles):
            yield [value, *values], own


def values(rows: Rows, column: str) -> list[float]:
    """A column, or a policy such as ``batch, held share``."""
    return [row[column] if column in row else row["policies"][column] for row in rows]


def mean_of(rows: Rows, column: str) -> str:
    """A column over seeds, as a cell; see `spread`."""
    return spread(values(rows, column))


def seeds(rows: Rows) -> int:
    return len({row["case"]["seed"] for row in rows})


def spread(values: Iterable[float]) -> str:
    """Mean, and spread over seeds (population standard deviation)."""
    found = list(values)
    if not found:
        return "-"
    return f"{mean(found):.2f} ± {pstdev(found):.2f}" if len(found) > 1 else f"{found[0]:.2f}"


def machine(content: Content) -> str:
    """``2 CPU cores (x86_64), torch 2.15``."""
    found = content["machine"]
    return f"{found['cores']} CPU cores ({found['processor']}), torch {found['torch']}"


def all_tables() -> dict[str, Callable[[], str]]:
    """The tables of all experiments, by name."""
    found: dict[str, Callable[[], str]] = {}
    for folder in FOLDERS:
        tables = importlib.import_module(f"experiments.{folder.name}.tables").TABLES
        assert not found.keys() & tables.keys(), f"{folder.name} has a table with the name of another one"
        found |= tables
    return found


def filled(text: str) -> str:
    """The text of a page with its tables made anew."""
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

"""The table of a page that is written by a program."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_BEGIN, _END = "<!-- table -->", "<!-- end -->"


def write_table(page: Path, header: str, lines: Iterable[str]) -> None:
    """Replace the table of a page."""
    separator = "| --- " * header.count(" | ") + "| --- |"
    table = "\n".join([_BEGIN, header, separator, *lines, _END])
    text = page.read_text()
    start, end = text.index(_BEGIN), text.index(_END) + len(_END)
    page.write_text(text[:start] + table + text[end:])


def rows_of(page: Path) -> dict[str, str]:
    """The rows of the table of a page, by what stands in their first column."""
    text = page.read_text()
    table = text[text.index(_BEGIN) : text.index(_END)]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    return {re.split(r" \| ", line)[0].removeprefix("| "): line for line in lines}

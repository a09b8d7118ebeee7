"""Matches module names with globs, and abbreviates lists of names. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches the last parts of a qualified name, as ``layer3.*`` matches ``net.layer3.1``."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def summary(names: Sequence[str]) -> str:
    """Names in a line, with runs of numbered siblings abbreviated: ``layer3.1-22``."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(name, runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    shown = []
    for first, *others in runs:
        last = others[-1].rpartition(".")[2] if others else ""
        shown.append(f"{first}-{last}" if others else first)
    return ", ".join(shown)


def _follows(name: str, before: str) -> bool:
    """Whether a name is that of the next numbered sibling."""
    stem, _, index = name.rpartition(".")
    stem_before, _, index_before = before.rpartition(".")
    if stem != stem_before or not index.isdecimal() or not index_before.isdecimal():
        return False
    return int(index) == int(index_before) + 1

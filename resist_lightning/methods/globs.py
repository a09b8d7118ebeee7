"""Matches module names with globs, and abbreviates lists of names. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches the last parts of a qualified name, as ``layer3.*`` matches ``net.layer3.1``."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def summary(names: Sequence[str]) -> str:
    """Names in a line, with runs of numbered siblings abbreviated: ``layer3.1-22``, ``layers.encoder_layer_1-5``."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(name, runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    shown = []
    for first, *others in runs:
        shown.append(f"{first}-{_numbered(others[-1])[1]}" if others else first)
    return ", ".join(shown)


def _follows(name: str, before: str) -> bool:
    """Whether a name is that of the next numbered sibling."""
    stem, number = _numbered(name)
    stem_before, number_before = _numbered(before)
    if stem != stem_before or not number or not number_before:
        return False
    return int(number) == int(number_before) + 1


def _numbered(name: str) -> tuple[str, str]:
    """A name without the digits at its end, and these."""
    stem = name.rstrip("0123456789")
    return stem, name[len(stem) :]

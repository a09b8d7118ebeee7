"""How a user names modules. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches the last parts of a qualified name, as ``layer3.*`` matches ``net.layer3.1``."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))


def summary(names: Sequence[str]) -> str:
    """Names, with runs of numbered siblings shortened: ``layer3.1-22``."""
    runs: list[list[str]] = []
    for name in names:
        stem, _, index = name.rpartition(".")
        last_stem, _, last_index = runs[-1][-1].rpartition(".") if runs else ("", "", "")
        if (
            runs
            and stem == last_stem
            and index.isdecimal()
            and last_index.isdecimal()
            and int(index) == int(last_index) + 1
        ):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs)

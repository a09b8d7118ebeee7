"""Finds short globs that choose exactly some blocks, for the user to copy. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

Choose = Callable[[Sequence[str]], Sequence[str]]
"""From globs, the names of the blocks that they choose."""

_ENDINGS = ("*", "[!0]*")
"""All children of a container; all but the one that is called 0."""


def short_globs(names: Sequence[str], choose: Choose) -> tuple[str, ...]:
    """Globs that choose exactly the blocks with these names: one, or one per container, or else all the names.

    Args:
        names: names of the blocks, at least one.
        choose: gives the blocks that globs choose.
    """
    sections: dict[str, list[str]] = {}
    for name in names:
        sections.setdefault(name.rpartition(".")[0], []).append(name)
    if len(sections) > 1:
        common = _common(list(sections))
        for glob in _candidates(common) if common else ():
            if _same(choose([glob]), names):
                return (glob,)
    globs: list[str] = []
    for section, inside in sections.items():
        candidates = _tails(inside[0]) if len(inside) == 1 else _candidates(section)
        globs += next(([glob] for glob in candidates if _same(choose([glob]), inside)), inside)
    return tuple(globs)


def _candidates(section: str) -> Iterator[str]:
    """Globs for the children of a container, the shortest first."""
    if not section:
        return
    for tail in _tails(section):
        for ending in _ENDINGS:
            yield f"{tail}.{ending}"


def _tails(name: str) -> list[str]:
    """The last part of a name, the last two, and so on; beginning with a word where there is one."""
    parts = name.split(".")
    starts = list(reversed(range(len(parts))))
    # A lone number or star says nothing to a reader.
    words = [start for start in starts if parts[start][0].isalpha()]
    return [".".join(parts[start:]) for start in words or starts]


def _common(names: Sequence[str]) -> str:
    """A glob that matches all names; empty if their numbers of parts differ."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        return ""
    common = []
    for parts in zip(*split, strict=True):
        if len(set(parts)) == 1:
            common.append(parts[0])
        else:
            # The common prefix: `layer` of layer1 and layer2.
            alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*parts, strict=False))
            common.append("".join(letters[0] for letters in alike) + "*")
    return ".".join(common)


def _same(found: Sequence[str], wanted: Sequence[str]) -> bool:
    return sorted(found) == sorted(wanted)

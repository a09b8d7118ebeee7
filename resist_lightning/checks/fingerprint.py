"""Compares the environments of workers and names the differences. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from resist_lightning.errors import process_name

Fingerprint: TypeAlias = Mapping[str, Mapping[str, str]]
"""A worker's environment in short strings: a value for each name of each topic."""

SHOWN = 5
"""Items of a long list that an error names."""


def digest(fingerprint: Fingerprint) -> int:
    """A hash of a fingerprint, of 48 bits."""
    text = json.dumps(fingerprint, sort_keys=True)
    # Six bytes: it is sent as a float64, which is exact up to 53 bits.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def differences(fingerprints: Sequence[Fingerprint], members: int = 1) -> list[str]:
    """The differences between processes, with the value of each; empty if there are none.

    Args:
        fingerprints: by rank.
        members: processes of each worker.
    """
    lines = []
    for topic in _union(fingerprints):
        lines += _differences(topic, [each.get(topic, {}) for each in fingerprints], members)
    return lines


def shorten(items: Sequence[str]) -> str:
    """The first items of a list, and the number of the others."""
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def describe_unequal(names: Sequence[str], hashes: Sequence[Sequence[float]], members: int = 1) -> str:
    """The tensors that differ between processes, and on which of them, in words.

    Args:
        names: of the tensors.
        hashes: by rank, a number for each tensor.
        members: processes of each worker.
    """
    found = []
    for name, *values in zip(names, *hashes, strict=True):
        (common, count), *others = Counter(values).most_common()
        if not others:
            continue
        # Without a majority nobody can say which value is the right one.
        if count == others[0][1]:
            found.append(f"{name} ({_workers(range(len(values)), members)} differ)")
            continue
        odd = [rank for rank, value in enumerate(values) if value != common]
        verb = "differs" if len(odd) == 1 else "differ"
        found.append(f"{name} ({_workers(odd, members)} {verb} from the others)")
    return shorten(found)


def _differences(topic: str, parts: Sequence[Mapping[str, str]], members: int) -> list[str]:
    """The differences in one topic: names that only some workers have, then values that differ."""
    names_by_owners: dict[tuple[int, ...], list[str]] = {}
    differing = []
    for name in _union(parts):
        owners = tuple(rank for rank, part in enumerate(parts) if name in part)
        if len(owners) < len(parts):
            names_by_owners.setdefault(owners, []).append(name)
            continue
        values = [part[name] for part in parts]
        if len(set(values)) > 1:
            by_process = ", ".join(f"{process_name(rank, members)} {value}" for rank, value in enumerate(values))
            differing.append(f"{name}: {by_process}")
    lines = []
    for owners, names in names_by_owners.items():
        verb = "has" if len(owners) == 1 else "have"
        lines.append(f"{topic}: only {_workers(owners, members)} {verb} {shorten(names)}")
    lines += differing[:SHOWN]
    if len(differing) > SHOWN:
        lines.append(f"and {len(differing) - SHOWN} more {topic}")
    return lines


def _workers(ranks: Iterable[int], members: int) -> str:
    texts = [process_name(rank, members).removeprefix("worker ") for rank in ranks]
    if len(texts) == 1:
        return f"worker {texts[0]}"
    return f"workers {', '.join(texts[:-1])} and {texts[-1]}"


def _union(parts: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys, in order of first appearance."""
    keys: dict[str, None] = {}
    for part in parts:
        keys.update(dict.fromkeys(part))
    return list(keys)

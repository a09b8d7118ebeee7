"""Compares what workers have in common and names what differs. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

Fingerprint: TypeAlias = Mapping[str, Mapping[str, str]]
"""What a worker says of itself, in short strings: a value for each name of each topic."""

SHOWN = 5
"""Of a long list, this many are told."""


def digest(fingerprint: Fingerprint) -> int:
    """A number of 48 bits that stands for a fingerprint; it survives the way as a float64."""
    return int.from_bytes(hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest()[:6], "big")


def write(fingerprint: Fingerprint) -> bytes:
    """A fingerprint, to be sent."""
    return json.dumps(fingerprint).encode()


def read(text: bytes) -> Fingerprint:
    """The fingerprint from what was received."""
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def differences(fingerprints: Sequence[Fingerprint]) -> list[str]:
    """How workers differ, with every worker's value; empty if they do not.

    Args:
        fingerprints: of all workers, in order.
    """
    topics = _union(fingerprints)
    return [line for topic in topics for line in _differences(topic, [f.get(topic, {}) for f in fingerprints])]


def cut(items: Sequence[str], joint: str = ", ") -> str:
    """The first items of a list, and how many more there are."""
    more = len(items) - SHOWN
    return joint.join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def unequal(names: Sequence[str], hashes: Sequence[Sequence[float]]) -> str:
    """Which tensors differ between workers, and on whom.

    Args:
        names: of the tensors.
        hashes: for each worker, a number for each tensor.
    """
    found = []
    for name, *values in zip(names, *hashes, strict=True):
        (common, count), *others = Counter(values).most_common()
        if others and count > others[0][1]:
            odd = [worker for worker, value in enumerate(values) if value != common]
            found.append(f"{name} ({_workers(odd)} {'differs' if len(odd) == 1 else 'differ'} from the others)")
        elif others:
            found.append(f"{name} ({_workers(range(len(values)))} differ)")
    return cut(found)


def _differences(topic: str, parts: Sequence[Mapping[str, str]]) -> list[str]:
    """The differences in one topic."""
    names = _union(parts)
    owners: dict[tuple[int, ...], list[str]] = {}
    differing = []
    for name in names:
        having = tuple(worker for worker, part in enumerate(parts) if name in part)
        if len(having) < len(parts):
            owners.setdefault(having, []).append(name)
        elif len({part[name] for part in parts}) > 1:
            differing.append(f"{name}: " + ", ".join(f"worker {w} {part[name]}" for w, part in enumerate(parts)))
    lines = [f"{topic}: only {_workers(having)} {_have(having)} {cut(few)}" for having, few in owners.items()]
    more = len(differing) - SHOWN
    return [*lines, *differing[:SHOWN], *([f"and {more} more {topic}"] if more > 0 else [])]


def _have(workers: Sequence[int]) -> str:
    return "has" if len(workers) == 1 else "have"


def _workers(numbers: Iterable[int]) -> str:
    texts = [str(number) for number in numbers]
    return f"worker {texts[0]}" if len(texts) == 1 else f"workers {', '.join(texts[:-1])} and {texts[-1]}"


def _union(parts: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys, in the order in which they come first."""
    return list(dict.fromkeys(key for part in parts for key in part))

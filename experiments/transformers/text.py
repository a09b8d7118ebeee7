"""Text that every Python has: the modules of its standard library as bytes, and n-gram baselines on it."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 256
# A stretch in every 32 is the hold-out, another one the test: hold-outs by position that look like the rest.
STRETCH, EVERY = 16_384, 32
PARTS = {"val": 15, "test": 31}


class Windows(NamedTuple):
    """Sequences of bytes, uint8 (windows, context), and for each byte the next one, of the same shape."""

    codes: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Windows:
        """These windows, in this order."""
        return Windows(self.codes[indices], self.labels[indices])


@lru_cache(maxsize=1)
def standard_library() -> bytes:
    """The modules of the standard library that are one file, in the order of their names (PSF licence)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def digest() -> str:
    """A hash of the text: two Pythons with the same one have the same text."""
    return hashlib.sha256(standard_library()).hexdigest()[:16]


@lru_cache(maxsize=1)
def stretches() -> dict[str, list[Tensor]]:
    """The text in stretches, uint8 (at most 16,384,), by part: `train`, `val` and `test`."""
    text = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8)
    found: dict[str, list[Tensor]] = {"train": [], **{name: [] for name in PARTS}}
    names = {place: name for name, place in PARTS.items()}
    for number, stretch in enumerate(text.split(STRETCH)):
        found[names.get(number % EVERY, "train")].append(stretch)
    return found


def windows(part: str, context: int, limit: int | None = None) -> Windows:
    """Windows of ``context`` bytes that do not overlap; at most ``limit`` of them, at equal distances."""
    cut = [stretch.unfold(0, context + 1, context) for stretch in stretches()[part] if len(stretch) > context]
    joined = torch.cat(cut)
    if limit is not None:
        joined = joined[:: max(1, len(joined) // limit)][:limit]
    return Windows(joined[:, :-1].contiguous(), joined[:, 1:].contiguous())


@lru_cache(maxsize=1)
def baselines() -> dict[str, float]:
    """Bits per byte of the test text by n-grams counted on the training text, with Witten and Bell's smoothing.

    The n-gram of n bytes is mixed with that of n - 1, weighted by counts and numbers of continuations of its context.
    """
    train, test = (torch.cat(stretches()[part]).long() for part in ("train", "test"))
    below = torch.full((1, VOCABULARY), 1 / VOCABULARY)
    found = {}
    for name, order in (("unigram", 1), ("bigram", 2), ("trigram", 3)):
        pairs = torch.bincount(_places(train, order), minlength=VOCABULARY**order)
        counts = pairs.view(-1, VOCABULARY).float()
        ways = (counts > 0).sum(1, keepdim=True).clamp(min=1)
        # Contexts of one order lie beside each other if they end alike, as the last byte counts ones.
        shorter = below.repeat(len(counts) // len(below), 1)
        below = (counts + ways * shorter) / (counts.sum(1, keepdim=True) + ways)
        found[name] = float(-below.flatten()[_places(test, order)].log2().mean())
    return found


def _places(text: Tensor, order: int) -> Tensor:
    """A number for each n-gram in the text."""
    length = len(text) - order + 1
    place = torch.zeros(length, dtype=torch.long)
    for offset in range(order):
        place = place * VOCABULARY + text[offset : offset + length]
    return place

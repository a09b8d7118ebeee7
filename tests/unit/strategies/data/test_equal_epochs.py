"""Epochs that end together: limits for loaders of different lengths."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader

from resist_lightning.comm.collective import SoloCollective
from resist_lightning.strategies.data.equal_epochs import end_epochs_together


class Pretended(SoloCollective):
    """The first of several workers; the others' numbers are given."""

    def __init__(self, others: list[float]) -> None:
        super().__init__()
        self.others = others

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers), *([other] for other in self.others)]


def cut(lengths: Sequence[Any], mode: Any, limit: Any, others: list[float]) -> tuple[int | None, list[str]]:
    """The number of batches in an epoch, as counted by Lightning, and the warnings."""
    loader = CombinedLoader([range(n) if isinstance(n, int) else n for n in lengths], mode)
    loader.limits = limit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end_epochs_together(loader, Pretended(others))
    return sized_len(iter(loader)), [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("lengths", "mode", "limit", "others", "after"),
    [
        ([7], "max_size_cycle", None, [5, 6], 5),
        ([7], "max_size_cycle", [7], [5], 5),
        ([7], "max_size_cycle", [6], [5], 5),
        ([5], "max_size_cycle", [5], [6], 5),
        ([9], "max_size_cycle", [float("inf")], [8], 8),
        ([4], "max_size_cycle", None, [0], 0),
        ([20, 4], "max_size_cycle", [20, 4], [18], 18),
        ([4, 20], "max_size", [4, 20], [18], 18),
        ([20, 4], "min_size", [20, 4], [3], 3),
        ([20, 3], "min_size", [20, 3], [4], 3),
        ([iter(()), 4], "max_size_cycle", [5, 4], [4], 4),
    ],
)
def test_the_shortest_epoch_ends_all(
    lengths: list[Any], mode: str, limit: Any, others: list[float], after: int
) -> None:
    found, (told,) = cut(lengths, mode, limit, others)

    assert found == after
    assert f"every epoch ends after {after} for all" in told


@pytest.mark.parametrize(
    ("lengths", "mode", "limit", "others", "after"),
    [
        ([5], "max_size_cycle", None, [5, 5], 5),
        ([5], "max_size_cycle", None, [], 5),
        ([7], "max_size_cycle", [4], [4], 4),  # of loaders of 7 and 5 batches
        ([20, 4], "max_size_cycle", [20, 4], [20], 20),
        ([20, 4], "max_size", [20, 4], [20], 20),
        ([iter(()), 20], "min_size", None, [20], 20),
        ([5], "max_size_cycle", None, [-1], 5),
        ([iter(range(5))], "max_size_cycle", None, [5], None),
        ([iter(()), 5], "max_size_cycle", None, [-1], None),
    ],
)
def test_equal_and_unknown_lengths_are_left_alone(
    lengths: list[Any], mode: str, limit: Any, others: list[float], after: int | None
) -> None:
    assert cut(lengths, mode, limit, others) == (after, [])

"""Epochs that end together: limits for loaders of different lengths."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from resist_lightning.strategies.epochs import end_epochs_together
from resist_lightning.verbs import SoloCollective


class Pretended(SoloCollective):
    """The first worker of several whose numbers are known."""

    def __init__(self, others: list[float]) -> None:
        super().__init__()
        self.others = others

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers), *([other] for other in self.others)]


def limit(before: Any, mine: object, others: list[float]) -> tuple[Any, list[str]]:
    trainer = SimpleNamespace(limit_train_batches=before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end_epochs_together(trainer, mine, Pretended(others))  # type: ignore[arg-type]
    return trainer.limit_train_batches, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("before", "mine", "others", "after"),
    [
        (1.0, 7, [5, 6], 5),
        (None, 7, [5, 6], 5),
        (0.5, 9, [8], 4),
        (3, 7, [5], 3),
        (6, 7, [5], 5),
        (6, 5, [7], 5),
        (1.0, 4, [0], 0),
    ],
)
def test_the_shortest_loader_limits_all(before: Any, mine: int, others: list[float], after: int) -> None:
    found, told = limit(before, range(mine), others)

    assert found == after
    assert isinstance(found, int)  # a share would be taken of each worker's own length
    assert len(told) == 1
    assert f"[{mine}, {', '.join(map(str, others))}] batches; every epoch ends after {min(mine, *others)}" in told[0]


@pytest.mark.parametrize(
    ("mine", "others"), [(range(5), [5, 5]), (range(5), []), (iter(range(5)), [5]), (range(5), [-1]), (iter(()), [-1])]
)
def test_equal_and_unknown_lengths_are_left_alone(mine: object, others: list[float]) -> None:
    for before in (0.5, 1.0, 3, None):
        assert limit(before, mine, others) == (before, [])

"""The angle between a worker's change and the mean change, on vectors whose angle is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from resist_lightning.checks.alignment import Alignment


def measured(own: Tensor, mean: Tensor) -> dict[str, float]:
    """The measures after a round from ones, with ``own`` changes whose mean over the workers is ``mean``."""
    alignment = Alignment()
    assert alignment.measure([torch.ones(3)]) == {}  # the round before was not seen
    alignment.end([torch.ones(3) + own])
    return alignment.measure([torch.ones(3) + mean])


@pytest.mark.parametrize(
    ("own", "mean", "cosine"),
    [
        ([2, 0, 0], [2, 0, 0], 1),
        ([2, 0, 0], [-1, 0, 0], -1),
        ([2, 0, 0], [1, 1, 0], math.sqrt(0.5)),
        ([1, 0, 0], [0, 0, 3], 0),
    ],
)
def test_it_is_the_cosine_of_the_changes(own: list[float], mean: list[float], cosine: float) -> None:
    found = measured(torch.tensor(own).float(), torch.tensor(mean).float())
    assert found["alignment"] == pytest.approx(cosine)


def test_the_length_of_the_change_is_relative_to_the_tensors() -> None:
    assert measured(torch.tensor([9.0, 0, 0]), torch.tensor([1.0, 1, 1]))["change"] == pytest.approx(0.5)


def test_a_round_that_changed_nothing_has_no_direction() -> None:
    assert measured(torch.zeros(3), torch.ones(3)) == {}
    assert measured(torch.ones(3), torch.zeros(3)) == {}


def test_a_round_that_was_not_seen_whole_is_left_out_and_the_next_is_measured() -> None:
    alignment = Alignment()
    alignment.end([torch.tensor([1.0])])
    assert alignment.measure([torch.tensor([2.0])]) == {}
    alignment.end([torch.tensor([3.0])])
    assert alignment.measure([torch.tensor([4.0])]) == {"alignment": 1.0, "change": 0.5}


def test_of_large_tensors_one_entry_in_64_counts() -> None:
    begun, own, mean = torch.zeros(8192), torch.zeros(8192), torch.zeros(8192)
    own[0], mean[0] = 1, 1
    own[1:64], mean[1:64] = 7, -7  # not sampled
    alignment = Alignment()
    alignment.measure([begun])
    alignment.end([own])
    assert alignment.measure([mean])["alignment"] == pytest.approx(1)


def test_tensors_that_come_later_are_not_compared() -> None:
    alignment = Alignment()
    alignment.measure([torch.ones(3)])
    alignment.end([torch.ones(4)])
    assert alignment.measure([torch.ones(4)]) == {}
    assert Alignment().measure([]) == {}

"""Cuts with the smallest possible largest stage."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.auxnet.partition import balance


def slowest(seconds, cuts):
    return max(math.fsum(seconds[first:last]) for first, last in pairwise([0, *cuts, len(seconds)]))


@pytest.mark.parametrize(
    ("seconds", "stages", "cuts"),
    [
        ([1, 1, 1, 1], 2, (2,)),
        ([1, 1, 1, 1], 4, (1, 2, 3)),
        ([5, 1, 1, 1], 2, (1,)),
        ([1, 1, 1, 5], 2, (3,)),
        ([3, 1, 2, 2, 1, 3], 3, (2, 4)),
        ([1, 1, 1, 1, 10], 3, (1, 4)),
        ([0, 0, 0], 2, (1,)),
        ([2.5], 1, ()),
        ([1, 2, 3], 1, ()),
    ],
)
def test_cuts_by_hand(seconds, stages, cuts):
    assert balance(seconds, stages) == cuts


@given(
    st.lists(st.one_of(st.integers(0, 4), st.floats(0, 1e3, allow_subnormal=False)), min_size=1, max_size=8).flatmap(
        lambda seconds: st.tuples(st.just(seconds), st.integers(1, len(seconds)))
    )
)
def test_no_other_cuts_are_better_and_no_earlier_ones_as_good(case):
    seconds, stages = case
    every = list(combinations(range(1, len(seconds)), stages - 1))
    least = min(slowest(seconds, cuts) for cuts in every)
    assert balance(seconds, stages) == min(cuts for cuts in every if slowest(seconds, cuts) == least)


@pytest.mark.parametrize("stages", [0, -1, 4])
def test_each_stage_needs_a_unit(stages):
    with pytest.raises(ValueError, match=rf"stages={stages} must lie between 1 and the number of units, 3\."):
        balance([1.0, 2.0, 3.0], stages)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_seconds_must_be_times(bad):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        balance([1.0, bad], 2)


def test_many_units_take_no_time():
    assert balance([1.0] * 120, 8) == (15, 30, 45, 60, 75, 90, 105)

"""The predicted speed-up has the four properties that the paper states of its Eq. 27 (section 2.6 of our notes)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.auxnet.speedup import StepSeconds

NAMES = ("data", "forward", "backward", "penalty", "aux_forward", "aux_backward")


@st.composite
def steps(draw):
    """Exact seconds, so that the properties hold exactly."""
    values = [draw(st.fractions(0, 5, max_denominator=8)) for _ in NAMES]
    values[1] += Fraction(1, 8)
    return StepSeconds(**dict(zip(NAMES, values, strict=True)))


WORKERS = st.integers(1, 64)


def test_by_hand():
    step = StepSeconds(data=1.0, forward=4.0, backward=8.0, penalty=0.25, aux_forward=0.25, aux_backward=0.5)
    assert step.predicted(4) == 13 / 5
    assert step.predicted(1) == 13 / 14


@given(steps(), WORKERS)
def test_it_is_above_one_exactly_where_what_is_saved_is_more_than_what_is_added(step, workers):
    saved = (step.forward + step.backward) * (1 - Fraction(1, workers))
    added = step.penalty + step.aux_forward + step.aux_backward
    assert (step.predicted(workers) > 1) == (saved > added)


@given(steps())
def test_with_enough_workers_it_is_above_one_exactly_if_the_network_takes_more_than_what_is_added(step):
    network, added = step.forward + step.backward, step.penalty + step.aux_forward + step.aux_backward
    enough = math.floor(network / (network - added)) + 1 if network > added else 10**6
    assert (step.predicted(enough) > 1) == (network > added)


def limit(step):
    """The speed-up with infinitely many workers: the work that each worker does remains."""
    remaining = step.data + step.penalty + step.aux_forward + step.aux_backward
    return (step.data + step.forward + step.backward) / remaining if remaining else math.inf


@given(steps(), WORKERS)
def test_it_stays_below_its_limit_and_grows_with_the_workers(step, workers):
    assert step.predicted(workers) < step.predicted(workers + 1) < limit(step)


@given(steps().filter(lambda step: limit(step) < math.inf))
def test_it_comes_as_close_to_its_limit_as_one_likes(step):
    assert limit(step) - step.predicted(10**9) < Fraction(1, 10**4)


def test_the_speed_up_of_nothing_but_the_network_is_the_number_of_workers():
    step = StepSeconds(data=0, forward=1, backward=2, penalty=0, aux_forward=0, aux_backward=0)
    assert step.predicted(5) == pytest.approx(5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(name, value):
    good = dict.fromkeys(NAMES, 1.0)
    with pytest.raises(ValueError, match=rf"{name}={value!r} must be a finite number of seconds, 0 or more"):
        StepSeconds(**{**good, name: value})


def test_there_must_be_something_to_speed_up_and_a_worker():
    with pytest.raises(ValueError, match="nothing to speed up"):
        StepSeconds(**{**dict.fromkeys(NAMES, 1.0), "forward": 0.0, "backward": 0.0})
    step = StepSeconds(**dict.fromkeys(NAMES, 1.0))
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        step.predicted(0)

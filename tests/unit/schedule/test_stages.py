"""Growth and the last rounds: minimum share of a worker, by round."""

from __future__ import annotations

import pytest

from resist_lightning import PostLocal
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.stages import NO_STAGES, parts_of, plan_stages


def shares(growth, finish, rounds, local_steps=3, first=0):
    """The minimum share in each round, where 0.1 is the usual one."""
    steps = rounds * local_steps
    found = plan_stages(growth, finish, local_steps, Clock(local_steps), steps, by="growth", first=first)
    return [found.least(round, 0.1) for round in range(rounds)]


def test_stages_have_equally_many_rounds_and_the_last_rounds_are_whole():
    assert shares((0.25, 0.5), 0, 6) == [0.25] * 3 + [0.5] * 3
    assert shares((0.25, 0.5), 2, 6) == [0.25, 0.25, 0.5, 0.5, 1, 1]
    assert shares((), 1, 4) == [0.1, 0.1, 0.1, 1]
    assert shares((0.5, 1), 0, 5, first=1) == [0.1, 0.5, 0.5, 1, 1]
    assert NO_STAGES.least(7, 0.3) == 0.3


def test_the_end_is_counted_from_where_the_run_is():
    """Rounds that were cut short do not shift it: at step 10, in round 4, two rounds of 3 steps are left."""
    clock = Clock(3, round=4, steps_before=10)
    found = plan_stages((), 1, 3, clock, 16, by="finish_rounds=1")
    assert [found.least(round, 0) for round in (4, 5)] == [0, 1]
    later = plan_stages((), 1, PostLocal(2, 5, 4), Clock(2), 14, by="finish_rounds=1")
    assert later.finish_from == 3  # rounds of 2, 2, 5, 5 steps


def test_without_a_known_end_it_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"growth=\[0.5, 1\] needs the number of local steps .* set max_steps"):
        plan_stages([0.5, 1], 0, 3, Clock(3), None, by="growth=[0.5, 1]")


@pytest.mark.parametrize("steps", [-1, 7.5, 9.0, True, "9"])
def test_a_length_of_the_run_that_is_no_whole_number_is_refused(steps):
    """A plain loop that gave len(loader) * epochs / accumulated, a fraction, got last rounds from a fraction on."""
    with pytest.raises(ValueError, match=rf"total_steps={steps!r} must be a whole number .* finish_rounds=1 needs"):
        plan_stages((), 1, 3, Clock(3), steps, by="finish_rounds=1")


@pytest.mark.parametrize(
    ("share", "parts", "expected"), [(0.1, 10, 1), (0.3, 10, 3), (0.31, 10, 4), (0.01, 5, 1), (1, 7, 7)]
)
def test_a_share_is_rounded_up_and_is_never_nothing(share, parts, expected):
    assert parts_of(share, parts) == expected

"""Lengths of rounds: by the formula of the paper, and by the step."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning import QSR, PostLocal
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import LONGEST, in_words


@given(st.integers(1, 50), st.integers(1, 10**6), st.integers(1, 10**6))
def test_qsr_is_the_square_of_coefficient_by_rate_rounded_down(base, coefficient, rate):
    exact = Fraction(coefficient, rate) ** 2
    found = QSR(base, float(coefficient)).of_round(0, float(rate))
    # A billionth below a whole number the floating-point square may be rounded to either side.
    slacks = [Fraction(1, 10**9) + Fraction(rounding, 10**12) for rounding in (-1, 0, 1)]
    assert found in {max(base, math.floor(exact * (1 + slack))) for slack in slacks}


def test_a_square_that_rounding_puts_below_a_whole_number_is_that_number():
    """0.3 / 0.1 is 2.9999999999999996, so a rate of 0.1 gave rounds of 8 local steps."""
    assert [QSR(1, coefficient).of_round(0, 0.1) for coefficient in (0.3, 0.7, 0.2999999)] == [9, 49, 8]


def test_qsr_takes_its_base_while_the_rate_warms_up_and_where_it_is_zero():
    rule = QSR(4, 0.2, warmup_steps=10)
    assert [rule.of_round(step, 0.01) for step in (0, 9, 10)] == [4, 4, 400]
    assert [rule.of_round(10, rate) for rate in (0.2, 0.1, 0.09, 0.0, float("nan"))] == [4, 4, 4, 4, 4]
    assert rule.of_round(10, 1e-300) == LONGEST == QSR(4, 1e300).of_round(0, 1e-300)


def test_post_local_changes_with_the_first_round_that_begins_at_the_switch():
    rule = PostLocal(3, 16, 7)
    assert [rule.of_round(step, 0.1) for step in (0, 6, 7, 8)] == [3, 3, 16, 16]
    clock = Clock.by(rule, lambda: None)
    begins = []
    for step in range(60):
        if clock.step == 0:
            begins.append((step, clock.local_steps))
        clock.tick()
        assert clock.total_steps == step + 1
        if clock.due:
            clock.next_round()
    assert begins == [(0, 3), (3, 3), (6, 3), (9, 16), (25, 16), (41, 16), (57, 16)]


def test_a_clock_reads_the_rate_where_a_round_begins():
    rate = [0.1]
    clock = Clock.by(QSR(2, 0.2), lambda: rate[0])
    assert (clock.local_steps, clock.agreed_steps) == (4, 4)
    rate[0] = 0.05
    clock.begin_round()  # before any training
    assert clock.local_steps == 16
    for _ in range(16):
        assert clock.agreed_steps == 16
        clock.tick()
        rate[0] /= 1.1
    # Complete: from here on the rate counts for the next round.
    rate[0] = 0.04
    assert (clock.local_steps, clock.agreed_steps) == (16, 25)
    clock.next_round()
    assert (clock.round, clock.step, clock.steps_before, clock.local_steps) == (1, 0, 16, 25)
    rate[0] = 0.1
    assert clock.agreed_steps == 25


def test_a_round_that_is_cut_short_counts_the_steps_that_were_taken():
    clock = Clock(50)
    clock.tick()
    clock.next_round()
    assert (clock.total_steps, clock.local_steps) == (1, 50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSR(0, 0.1), "QSR: base=0 must be a whole number of at least 1"),
        (lambda: QSR(2.0, 0.1), r"QSR: base=2\.0 must be a whole number"),
        (lambda: QSR(True, 0.1), "QSR: base=True"),
        (lambda: QSR(2, 0.0), r"QSR: coefficient=0\.0 must be a finite number above 0"),
        (lambda: QSR(2, math.nan), "QSR: coefficient=nan"),
        (lambda: QSR(2, math.inf), "QSR: coefficient=inf"),
        (lambda: QSR(2, "0.1"), "QSR: coefficient='0.1'"),
        (lambda: QSR(2, 0.1, -1), "QSR: warmup_steps=-1 must be a whole number of at least 0"),
        (lambda: PostLocal(0, 4, 1), "PostLocal: first=0"),
        (lambda: PostLocal(1, None, 1), "PostLocal: then=None"),
        (lambda: PostLocal(1, 4, 0.5), r"PostLocal: switch_step=0\.5 must be a whole number of at least 0"),
        (lambda: Clock.by(QSR(2, 0.1), lambda: None), "follows the learning rate, but no optimizer has one"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "words", "shortest"),
    [
        (50, "50 local steps", 50),
        (QSR(4, 0.0175), "(0.0175 / learning rate)² local steps, at least 4", 4),
        (QSR(4, 0.0175, 9), "(0.0175 / learning rate)² local steps, at least 4; 4 in the first 9", 4),
        (PostLocal(1, 16, 500), "1 local steps, and of 16 from step 500 on", 1),
    ],
)
def test_rules_in_words(rule, words, shortest):
    assert in_words(rule) == words
    assert isinstance(rule, int) or rule.shortest == shortest


@pytest.mark.parametrize(
    ("rule", "steps", "said"),
    [
        (QSR(4, 0.1, 100), 100, "warmup_steps cover all 100 local steps of this training, so all rounds have 4"),
        (QSR(4, 0.1, 100), 101, ""),
        (PostLocal(1, 16, 100), 100, "switch_step lies after the end of this training of 100 local steps"),
        (PostLocal(1, 16, 99), 100, ""),
        (PostLocal(3, 3, 500), 100, ""),
    ],
)
def test_settings_that_come_too_late_are_told(rule, steps, said):
    assert bool(rule.unused(steps)) == bool(said)
    assert re.search(re.escape(said), rule.unused(steps))

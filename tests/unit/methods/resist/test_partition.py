"""Rounds are counted in local steps; the partition of a round depends on its number only."""

from __future__ import annotations

import json
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning import Config, PostLocal
from resist_lightning.methods.resist.config import make_schedule, plan_end
from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.methods.resist.scaling import coverage
from resist_lightning.schedule.partition import deal, draw_partition, everything
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import rounds_in


def test_warm_up_rounds_have_everything_everywhere_and_then_the_deal_begins():
    schedule = Schedule(blocks=6, workers=3, min_blocks=1, seed=4, warmup_rounds=2)
    assert [schedule.is_whole(round) for round in range(4)] == [True, True, False, False]
    assert [schedule.partition(round) for round in (0, 1)] == [everything(6, 3)] * 2
    assert [schedule.partition(round) for round in (2, 3)] == [draw_partition(6, 3, 1, 4, r) for r in (2, 3)]


def test_in_the_last_rounds_all_hold_everything_again():
    schedule = Schedule(blocks=6, workers=3, min_blocks=1, seed=4, warmup_rounds=1, finish_from=3)
    assert [schedule.is_whole(round) for round in range(5)] == [True, False, False, True, True]
    assert [schedule.partition(round) for round in (0, 3, 4)] == [everything(6, 3)] * 3
    assert [schedule.partition(round) for round in (1, 2)] == [draw_partition(6, 3, 1, 4, r) for r in (1, 2)]


@pytest.mark.parametrize(
    ("rule", "finish", "clock", "steps", "first"),
    [
        (10, 2, Clock(10), 100, 8),
        (10, 2, Clock(10), 101, 9),  # the last round has one step
        (10, 2, Clock(10), 5, -1),
        (10, 2, Clock(10, round=4, step=3, steps_before=40), 100, 8),
        (10, 2, Clock(10, round=9, step=3, steps_before=85), 100, 9),  # an early round was cut short
        (PostLocal(2, 10, 7), 3, Clock(2), 38, 4),  # four rounds to step 8, and three more
        (PostLocal(2, 10, 7), 4, Clock(2), 38, 3),
        (PostLocal(2, 10, 70), 3, Clock(2), 38, 16),
        (PostLocal(2, 10, 7), 1, Clock(10, round=5, steps_before=18), 38, 6),
    ],
)
def test_the_last_rounds_follow_from_the_steps_that_are_left(rule, finish, clock, steps, first):
    config = Config(local_steps=rule, finish_rounds=finish, min_blocks=1)
    assert plan_end(make_schedule(config, 6, 3), config, clock, steps).finish_from == first


def grown(clock, steps, **options):
    config = Config(local_steps=10, **options)
    return plan_end(make_schedule(config, 8, 4), config, clock, steps)


def counts_of(schedule, rounds):
    return [set(map(len, schedule.partition(round).held)) for round in range(rounds)]


def test_a_run_grows_in_stages_of_equally_many_rounds_between_warm_up_and_finish():
    schedule = grown(Clock(10), 95, growth=[0.25, 0.5, 1], warmup_rounds=1, finish_rounds=1)
    assert schedule.stages == ((1, 2), (3, 4), (6, 8))  # of ten rounds eight grow
    assert counts_of(schedule, 10) == [{8}, {2}, {2}, {4}, {4}, {4}, {8}, {8}, {8}, {8}]
    assert [schedule.partition(round) for round in (1, 4)] == [
        draw_partition(8, 4, n, 0, r) for n, r in ((2, 1), (4, 4))
    ]
    # By the position of the run, not by its path.
    assert (
        grown(Clock(10, round=4, step=7, steps_before=40), 95, growth=[0.25, 0.5, 1], warmup_rounds=1, finish_rounds=1)
        == schedule
    )


def test_a_branch_weighs_as_much_in_all_stages():
    schedule = grown(Clock(10), 100, growth=[0.25, 0.5, 0.7, 1], warmup_rounds=2)
    scale = coverage(schedule)
    assert scale == 0.25
    for round in range(10):
        assert schedule.training_scale(round, scale) * schedule.share(round) == pytest.approx(scale)
    assert [schedule.training_scale(round, scale) for round in (0, 2, 4, 9)] == [0.25, 1, 0.5, 0.25]


@pytest.mark.parametrize(("shares", "least"), [([0.01], 2), ([0.26], 3), ([0.3], 3), ([0.375], 3), ([1], 8)])
def test_shares_are_rounded_up_and_every_block_is_held(shares, least):
    schedule = grown(Clock(10), 50, growth=shares)
    held = schedule.partition(3).held
    assert {len(blocks) for blocks in held} == {least}
    assert set().union(*held) == set(range(8))


def test_runs_too_short_to_grow_end_whole():
    assert counts_of(grown(Clock(10), 20, growth=[0.25, 0.5, 1]), 2) == [{4}, {8}]
    assert counts_of(grown(Clock(10), 5, growth=[0.25, 0.5, 1], warmup_rounds=3), 1) == [{8}]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 60), st.integers(0, 99))
def test_rounds_to_come_are_as_many_as_a_clock_counts(short, long, switch, steps):
    rule = PostLocal(short, long, switch)
    clock, left = Clock.by(rule, lambda: None), []
    for _ in range(steps):
        if clock.step == 0:
            left.append(rounds_in(rule, clock.steps_before, steps))
        clock.tick()
        if clock.due:
            clock.next_round()
    begun = clock.round + (clock.step > 0)
    assert left == list(range(begun, 0, -1))


def test_no_warm_up_by_default():
    schedule = Schedule(blocks=6, workers=3, min_blocks=1, seed=0)
    assert not schedule.is_whole(0)
    assert schedule.partition(0) == draw_partition(6, 3, 1, 0, 0)


@given(st.integers(1, 20), st.integers(0, 200))
def test_a_round_ends_after_its_local_steps_and_no_step_is_lost(local_steps, steps):
    clock = Clock(local_steps)
    syncs = []
    for step in range(1, steps + 1):
        assert not clock.due
        clock.tick()
        assert clock.total_steps == step
        if clock.due:
            syncs.append(step)
            clock.next_round()
            assert clock.total_steps == step
    assert syncs == list(range(local_steps, steps + 1, local_steps))
    assert (clock.round, clock.step) == divmod(steps, local_steps)


AUTO = Schedule(blocks=6, workers=3, min_blocks=1, seed=4).measuring(0)
SLOW_LAST = {1: [3.0, 3.1, 9.0], 2: [5.0, 5.1, 15.0], 3: [3.0, 3.1, 99.0], 4: [5.0, 5.1, 15.0]}


def learn_all(schedule, rows, first=0, rounds=7):
    """The schedules learned after each of the first rounds."""
    schedules = [schedule]
    for round in range(first, first + rounds):
        schedules.append(schedules[-1].learn(round, rows.get(round, [1.0] * schedule.workers)))
    return schedules


def test_listed_counts_hold_from_their_round_on():
    schedule = Schedule(6, 2, 1, 4, warmup_rounds=1, counts=((0, (2, 4)), (5, (4, 3))))
    assert schedule.partition(0) == everything(6, 2)
    assert [schedule.partition(r) for r in (1, 4)] == [deal(6, (2, 4), 4, r) for r in (1, 4)]
    assert [schedule.partition(r) for r in (5, 99)] == [deal(6, (4, 3), 4, r) for r in (5, 99)]


def test_rounds_that_are_measured_have_few_and_many_blocks_and_then_shares_follow_speed():
    last = learn_all(AUTO, SLOW_LAST)[-1]
    sizes = [tuple(map(len, last.partition(round).held)) for round in range(9)]
    assert sizes == [(2, 2, 2), *[(2, 2, 2), (4, 4, 4)] * 2, (2, 2, 2), *[(3, 2, 1)] * 3]
    assert last.counts == ((6, (3, 2, 1)),)  # the shorter one of rounds 1 and 3 counts


def test_the_next_round_s_partition_never_changes_once_a_round_has_begun():
    """An evaluation in a round shows the result of its sync, so it needs the same plan."""
    for round, (before, after) in enumerate(zip(*(learn_all(AUTO, SLOW_LAST)[i:] for i in (0, 1)), strict=False)):
        assert [before.partition(r) for r in range(round + 2)] == [after.partition(r) for r in range(round + 2)]


def test_equally_fast_workers_keep_today_s_partitions():
    last = learn_all(AUTO, {1: [1.0, 1.1, 1.14], 2: [2.0, 2.2, 2.25]})[-1]
    assert last.counts
    assert [last.partition(r) for r in (0, 5, 6, 7)] == [draw_partition(6, 3, 1, 4, r) for r in (0, 5, 6, 7)]


def test_measuring_waits_for_the_warm_up_and_is_left_out_where_all_hold_everything():
    warm = Schedule(6, 3, 1, 4, warmup_rounds=3).measuring(0)
    assert warm.measured_from == 4
    assert not learn_all(warm, {}, rounds=4)[-1].seconds
    assert Schedule(6, 3, 6, 4).measuring(0).measured_from is None
    assert Schedule(6, 1, 1, 4).measuring(0).measured_from is None


@pytest.mark.parametrize("stop", range(8))
def test_a_table_that_was_saved_and_read_goes_on_as_if_nothing_had_happened(stop):
    unbroken = learn_all(AUTO, SLOW_LAST)[-1]
    saved = learn_all(AUTO, SLOW_LAST, rounds=stop)[-1].state_dict()
    resumed = AUTO.with_state_dict(json.loads(json.dumps(saved)))
    again = reduce(lambda s, r: s.learn(r, SLOW_LAST.get(r, [1.0] * 3)), range(stop, 7), resumed)
    assert again == unbroken
    assert again.state_dict() == unbroken.state_dict() != {}


def test_nothing_is_saved_where_nothing_is_measured():
    assert Schedule(6, 3, 1, 4, counts=((0, (2, 2, 2)),)).state_dict() == {}


def test_too_few_measurements_keep_equal_shares():
    """A resume that skipped rounds, or a round without a step."""
    assert learn_all(AUTO, {r: [0.0] * 3 for r in range(7)})[-1].counts == ((6, (2, 2, 2)),)
    late = learn_all(AUTO, {}, first=4, rounds=2)[-1]
    assert late.counts == ((6, (2, 2, 2)),)
    assert learn_all(AUTO, {}, first=30, rounds=1)[-1].counts == ((32, (2, 2, 2)),)

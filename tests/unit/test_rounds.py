"""Rounds are counted in local steps; the partition of a round depends on its number only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.partition import draw_partition, everything
from resist_lightning.rounds import Clock, Schedule


def test_warm_up_rounds_have_everything_everywhere_and_then_the_deal_begins():
    schedule = Schedule(blocks=6, workers=3, min_blocks=1, seed=4, local_steps=10, warmup_rounds=2)
    assert [schedule.is_warmup(round) for round in range(4)] == [True, True, False, False]
    assert [schedule.partition(round) for round in (0, 1)] == [everything(6, 3)] * 2
    assert [schedule.partition(round) for round in (2, 3)] == [draw_partition(6, 3, 1, 4, r) for r in (2, 3)]


def test_no_warm_up_by_default():
    schedule = Schedule(blocks=6, workers=3, min_blocks=1, seed=0, local_steps=10)
    assert not schedule.is_warmup(0)
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

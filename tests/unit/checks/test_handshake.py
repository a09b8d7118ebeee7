"""Contract 12: a sync begins with a handshake; its numbers reach all workers, disagreements too."""

from __future__ import annotations

import pytest

from resist_lightning import QSR, Config, PostLocal, WorkersDisagree
from resist_lightning.checks.handshake import Handshake, Host
from resist_lightning.checks.header import Purpose
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.progress import Clock
from tests.helpers.nets import small_preact
from tests.helpers.threads import run_threads


class Talkative(Host):
    def __init__(self, number, stop):
        self.number, self.stop, self.heard, self.agreed = number, stop, None, None

    def stop_flag(self):
        return self.stop

    def report(self):
        return [self.number, self.number + 0.5]

    def on_reports(self, reports):
        self.heard = reports

    def agree(self, reports):
        self.agreed = reports


def meet(collective, steps, stops, purposes):
    me = collective.worker
    host = Talkative(10.0 * me, stops[me])
    layout = BlockLayout(small_preact(), Config(min_blocks=1), collective.workers)
    handshake = Handshake(layout, collective, host)
    try:
        extra = handshake.run(purposes[me], Clock(50, round=2, step=steps[me]), [me + 3, -0.25])
    except WorkersDisagree as error:
        return str(error), host.heard
    assert host.agreed == (host.heard if purposes[me] == Purpose.SYNC else None)
    return extra, host.heard


SYNC = (Purpose.SYNC,) * 3


@pytest.mark.parametrize("purpose", [Purpose.SYNC, Purpose.EVALUATION])
def test_extra_numbers_and_reports_of_all_workers_reach_all(purpose):
    results, room = run_threads(meet, 3, (7, 7, 7), (1, 1, 1), (purpose,) * 3)
    assert results == [([[3, -0.25], [4, -0.25], [5, -0.25]], [[0.0, 0.5], [10.0, 10.5], [20.0, 20.5]])] * 3
    assert [verb for _, verb, _ in room.log] == ["gather_numbers"] * 3


@pytest.mark.parametrize(
    ("steps", "stops", "purposes", "said"),
    [
        ((7, 6, 7), (0, 0, 0), SYNC, "step: worker 0 7, worker 1 6, worker 2 7"),
        ((7, 7, 7), (0, 0, 1), SYNC, "stop: worker 0 0, worker 1 0, worker 2 1"),
        ((7, 7, 7), (0, 0, 0), (Purpose.SYNC, Purpose.SYNC, Purpose.FINISH), "worker 1 sync, worker 2 finish"),
    ],
)
def test_whoever_differs_all_hear_the_same_error_and_learn_nothing(steps, stops, purposes, said):
    results, _ = run_threads(meet, 3, steps, stops, purposes)
    assert len({message for message, _ in results}) == 1
    assert said in results[0][0]
    assert [heard for _, heard in results] == [None] * 3


def meet_twice(collective, rates):
    layout = BlockLayout(small_preact(), Config(min_blocks=1), collective.workers)
    handshake = Handshake(layout, collective, Host(), lambda: rates[collective.worker])
    for purpose in (Purpose.EVALUATION, Purpose.SYNC, Purpose.SYNC):
        handshake.run(purpose, Clock(50, round=2, step=7))


@pytest.mark.parametrize(("rates", "times"), [((0.5, 0.5), 0), ((0.5, 0.05), 1)])
def test_learning_rates_that_part_are_told_once(rates, times, recwarn):
    run_threads(meet_twice, 2, rates)
    assert len(recwarn.list) == times
    assert all("worker 0 0.5, worker 1 0.05" in str(warning.message) for warning in recwarn.list)


def meet_in_a_round(collective, rule, rates):
    rates = iter(rates)
    now = [next(rates)]
    layout = BlockLayout(small_preact(), Config(min_blocks=1), collective.workers)
    handshake = Handshake(layout, collective, Host(), lambda: now[0])
    clock = Clock.by(rule, lambda: now[0])
    for rate in rates:
        now[0] = rate
        clock.step = clock.local_steps
        handshake.run(Purpose.SYNC, clock)
        clock.next_round()


@pytest.mark.parametrize(
    ("rule", "rates", "times"),
    [
        (QSR(2, 0.1), [0.01, 0.02, 0.03, 0.02], 1),  # one warning, though two rounds are too long
        (QSR(2, 0.1), [0.03, 0.02, 0.01], 0),
        (QSR(2, 0.1, warmup_steps=3), [0.01, 0.02, 0.03, 0.02], 0),
        (PostLocal(2, 3, 1), [0.01, 0.02, 0.03], 0),
    ],
)
def test_rounds_that_a_rising_rate_made_too_long_are_told_once(rule, rates, times, recwarn):
    run_threads(meet_in_a_round, 2, rule, rates)
    assert len(recwarn.list) == times
    assert all("gave round 0 100 local steps" in str(warning.message) for warning in recwarn.list)


def test_a_host_has_nothing_to_say_by_default():
    host = Host()
    assert (host.stop_flag(), host.report(), host.on_reports([[]]), host.agree([[]])) == (0, [], None, None)

from __future__ import annotations

import pytest

from resist_lightning.schedule import progress
from resist_lightning.schedule.progress import Activity, ActivityName, Clock, StepTimer


def test_an_activity_says_what_began_where_and_tells_its_listeners() -> None:
    clock, heard = Clock(local_steps=3), []
    activity = Activity(clock)
    activity.listeners.append(lambda now: heard.append((now.what, now.round, now.step)))

    clock.tick()
    activity.begin("local steps")
    clock.next_round()
    described = activity.describe()
    activity.begin("hand_over")

    assert described == "local steps, round 0, local step 1"  # where it began
    assert activity.describe() == "hand-over, round 1, local step 0"
    assert heard == [("local steps", 0, 1), ("hand_over", 1, 0)]


def test_only_the_time_in_local_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = Clock(local_steps=3)
    activity = Activity(clock)
    timer = StepTimer(activity)

    def after(seconds: float, what: ActivityName, *, step: bool = False) -> None:
        now[0] += seconds
        if step:
            clock.tick()
        activity.begin(what)

    assert timer.take() == 0.0
    after(50, "local steps")  # it was starting
    after(1, "local steps", step=True)
    after(2, "local steps", step=True)
    after(0.5, "evaluation")
    after(30, "local steps")
    after(4, "local steps", step=True)
    after(0.5, "handshake")
    assert timer.take() == pytest.approx((1 + 2 + 0.5 + 4 + 0.5) / 3)

    after(20, "averaging")
    clock.next_round()
    after(20, "local steps")
    after(7, "local steps", step=True)
    assert timer.take() == pytest.approx(7)
    assert timer.take() == 0.0

"""Seconds of local steps: syncs and observations are not counted."""

from __future__ import annotations

import pytest

from resist_lightning.schedule import progress as module
from resist_lightning.schedule.progress import Activity, Clock, Pace


def test_only_the_time_in_local_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    clock = Clock(local_steps=3)
    activity = Activity(clock)
    pace = Pace(activity)

    def after(seconds: float, what: module.What, *, step: bool = False) -> None:
        now[0] += seconds
        if step:
            clock.tick()
        activity.begin(what)

    assert pace.take() == 0.0
    after(50, "local steps")  # it was starting
    after(1, "local steps", step=True)
    after(2, "local steps", step=True)
    after(0.5, "evaluation")
    after(30, "local steps")
    after(4, "local steps", step=True)
    after(0.5, "handshake")
    assert pace.take() == pytest.approx((1 + 2 + 0.5 + 4 + 0.5) / 3)

    after(20, "averaging")
    clock.next_round()
    after(20, "local steps")
    after(7, "local steps", step=True)
    assert pace.take() == pytest.approx(7)
    assert pace.take() == 0.0

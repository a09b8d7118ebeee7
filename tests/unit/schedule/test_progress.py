from __future__ import annotations

from resist_lightning.schedule.progress import Activity, Clock


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

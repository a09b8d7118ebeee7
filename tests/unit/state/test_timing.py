from __future__ import annotations

import pytest
import torch

from resist_lightning.state import timing
from resist_lightning.state.timing import Seconds


def test_seconds_inside_are_added_up_by_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    seconds = Seconds(torch.device("cpu"))
    for what in ("sync", "observe", "sync"):
        with seconds.timed(what):
            pass
    assert (seconds.sync, seconds.observe) == (6.0, 0.5)
    assert seconds.sync == 6.0  # read once
    assert [seconds.take_sync(), seconds.take_sync(), seconds.observe] == [6.0, 0.0, 0.5]

"""RoundMonitor's arguments; what it reports is tested by ``tests/integration/test_round_monitor.py``."""

from __future__ import annotations

import pytest

from resist_lightning.callbacks import RoundMonitor


@pytest.mark.parametrize("every_n_rounds", [0, -1])
def test_it_logs_at_least_once_in_a_number_of_rounds(every_n_rounds: int) -> None:
    with pytest.raises(ValueError, match=f"every_n_rounds={every_n_rounds} must be at least 1"):
        RoundMonitor(every_n_rounds)
    RoundMonitor(1)

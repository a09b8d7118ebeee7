from __future__ import annotations

from tests.helpers.programs import TORCHRUN, run_module


def test_the_plain_loop_trains_under_torchrun() -> None:
    output = run_module(*TORCHRUN, "-m", "experiments.plain_loop", "--steps=12", "--local-steps=10")
    assert "after 12 local steps: test accuracy" in output
    assert "'hand_over'" in output

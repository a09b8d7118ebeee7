from __future__ import annotations

from tests.helpers.programs import be_program, run_torchrun


def test_the_plain_loop_trains_under_torchrun() -> None:
    output = run_torchrun(be_program, "experiments.plain_loop", ["--steps=24"], {}, max_restarts=0)
    assert "after 24 local steps: test accuracy" in output
    assert "'hand_over'" in output

from __future__ import annotations

from tests.helpers.programs import ROOT, run_program


def test_the_plain_loop_trains_under_torchrun() -> None:
    output = run_program(
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "experiments/plain_loop.py", "--steps", "24"], ROOT
    )
    assert "after 24 local steps: test accuracy" in output
    assert "'hand_over'" in output

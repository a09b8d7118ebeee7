from __future__ import annotations

from tests.helpers.programs import run_module


def test_the_plain_loop_trains_under_torchrun() -> None:
    output = run_module("torch.distributed.run", "--nproc-per-node=2", "experiments/plain_loop.py", "--steps=24")
    assert "after 24 local steps: test accuracy" in output
    assert "'hand_over'" in output

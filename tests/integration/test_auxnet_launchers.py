"""Launchers train a network in stages bit for bit alike, and a run that torchrun restarts resumes by itself.

Other launchers: ``test_launchers.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.auxnet import CUTS, Metered, fit_stages
from tests.helpers.launched_stages import STEPS, main, train
from tests.helpers.processes import run_workers
from tests.helpers.programs import as_a_main_process, run_torchrun
from tests.helpers.trainers import run_trainers
from tests.helpers.training import assert_equal_states, clone_state

KILLED_AFTER = 7
"""After the second handshake."""


def expect(worker: int) -> dict[str, Any]:
    module = Metered()
    strategy = {"cuts": CUTS[2], "method": "al-net", "multiplier_every": 2}
    trainer = fit_stages(worker, module, strategy, max_epochs=2)
    return {
        "state": clone_state(module),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Results of workers that exist already."""
    found: dict[str, Any] = run_trainers(expect, 2)[0]
    return found


def test_torchrun_trains_the_same_where_a_worker_is_killed(expected: Any, tmp_path: Path) -> None:
    output = run_torchrun(main, str(tmp_path), KILLED_AFTER, max_restarts=1)

    assert (tmp_path / "harmed").exists()
    for worker in range(2):
        found = torch.load(tmp_path / f"worker{worker}.pt", weights_only=False)
        assert_equal_states(found["state"], expected["state"], exactly=True)
        assert not found["left"]
        assert found["steps"] == list(range(KILLED_AFTER, STEPS + 1)), output
    assert output.count("net is cut into 2 stages") == 2


def fork(_: int, folder: str) -> dict[str, Any]:
    as_a_main_process()
    return train("fork", folder)


def test_forked_workers_train_the_same(expected: Any, tmp_path: Path) -> None:
    found = run_workers(fork, 1, str(tmp_path))[0]
    assert_equal_states(found["state"], expected["state"], exactly=True)
    assert found["metrics"] == expected["metrics"]

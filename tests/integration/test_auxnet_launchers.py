"""The ways to start workers train the same stages, bit for bit; what torchrun starts again goes on by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.auxnet import Metered, fit_stages
from tests.helpers.launched_stages import STEPS, train
from tests.helpers.processes import run_workers
from tests.helpers.trainers import run_trainers
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_launchers import PATIENCE_SECONDS, as_a_main_process, run

SCRIPT = [sys.executable, "-m", "tests.helpers.launched_stages"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
    *("--rdzv-endpoint=localhost:0", "--max-restarts=1", "-m", "tests.helpers.launched_stages"),
]

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS + 30)


def expect(worker: int) -> dict[str, Any]:
    module = Metered()
    strategy = {"cuts": ["section2"], "method": "al-net", "multiplier_every": 2}
    trainer = fit_stages(worker, module, strategy, max_epochs=2)
    return {
        "state": clone_state(module),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What workers that exist already train."""
    found: dict[str, Any] = run_trainers(expect, 2)[0]
    return found


@pytest.mark.parametrize(
    ("command", "start_method", "workers", "harm_after"),
    [(SCRIPT, "popen", (0, 1), 0), (TORCHRUN, "popen", (0, 1), 7), (SCRIPT, "spawn", (0,), 0)],
    ids=["script", "torchrun, and a worker is killed", "spawn"],
)
def test_launchers_train_the_same(
    command: list[str],
    start_method: str,
    workers: tuple[int, ...],
    harm_after: int,
    expected: Any,
    root: Path,
    tmp_path: Path,
) -> None:
    """Under torchrun worker 1 is killed behind the second handshake, and the run goes on from there."""
    ended = run([*command, start_method, str(tmp_path), *([str(harm_after)] if harm_after else [])], root)

    assert ended.returncode == 0, ended.stdout
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"{start_method}-worker{w}.pt" for w in workers]
    assert (tmp_path / "harmed").exists() == bool(harm_after)
    for worker in workers:
        found = torch.load(tmp_path / f"{start_method}-worker{worker}.pt", weights_only=False)
        assert_equal_states(found["state"], expected["state"], exactly=True)
        assert not found["left"]
        if start_method == "popen":
            assert found["steps"] == list(range(harm_after or 1, STEPS + 1)), ended.stdout
        if not harm_after:  # of an epoch that was begun in another life, metrics have what was logged in this one
            assert found["metrics"] == expected["metrics"]
    assert ended.stdout.count("net is cut into 2 stages") == 1 + bool(harm_after)


def fork(_: int, folder: str) -> dict[str, Any]:
    as_a_main_process()
    return train("fork", folder)


def test_forked_workers_train_the_same(expected: Any, tmp_path: Path) -> None:
    found = run_workers(fork, 1, str(tmp_path))[0]
    assert_equal_states(found["state"], expected["state"], exactly=True)
    assert found["metrics"] == expected["metrics"]

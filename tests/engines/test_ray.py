"""The strategies in workers of Ray Train: weights as elsewhere, restarts after a loss, and a sweep by Ray Tune."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import resist_lightning
from tests.engines.ray_training import METHODS, fit
from tests.engines.servers import require
from tests.helpers.programs import ROOT, run_program
from tests.helpers.trainers import run_trainers
from tests.helpers.training import assert_equal_states

INSTALL = "pip install 'ray[train]>=2.51', or pip install --target FOLDER and PYTHONPATH=FOLDER"
TIMEOUT_SECONDS = 500

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS + 60)


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of a program under Ray."""
    require(INSTALL, packages=["ray", "pyarrow", "tensorboardX"])
    folder = tmp_path_factory.mktemp("ray")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray starts its workers at niceness 15: beside other programs on two cores they took eleven minutes to start.
    output = run_program(
        ["-m", "tests.engines.on_ray", str(folder)], ROOT, timeout=TIMEOUT_SECONDS,
        PYTHONPATH=path, RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0",
    )  # fmt: skip
    (folder / "output.txt").write_text(output)
    return folder


def elsewhere(worker: int, method: str, folder: str) -> dict[str, Any]:
    return fit(method, getattr(resist_lightning, f"{method}Strategy"), Path(folder), devices=2)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_workers_that_ray_has_not_started(method: str, on_ray: Path, tmp_path: Path) -> None:
    expected = run_trainers(elsewhere, 2, method, str(tmp_path))
    for rank in range(2):
        assert_equal_states(torch.load(on_ray / f"{method}-{rank}.pt"), expected[0])


def test_a_run_that_ray_starts_again_ends_with_the_weights_of_one_that_was_not_disturbed(on_ray: Path) -> None:
    """Each worker has written its own file to a folder of its own, as on several hosts, and Ray has collected them."""
    assert (on_ray / "died").exists()
    for rank in range(2):
        assert (on_ray / f"resumed-{rank}").exists()
        assert_equal_states(torch.load(on_ray / f"dies-{rank}.pt"), torch.load(on_ray / f"ResIST-{rank}.pt"))
    output = (on_ray / "output.txt").read_text()
    assert "resumes exactly where the checkpoint was written" in output
    assert "name this checkpoint differently" not in output


def test_a_sweep_over_local_steps(on_ray: Path) -> None:
    results = json.loads((on_ray / "sweep.json").read_text())
    assert sorted(result["local_steps"] for result in results) == [2, 12]
    assert len({result["loss"] for result in results}) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("start_method", "start_method='spawn' has no effect under Ray. Ray starts the workers: leave it out."),
        ("snapshots", "snapshots='/shared' has no effect under Ray. Ray restarts the workers from the checkpoint"),
        ("process_group_backend", "TorchTrainer(torch_config=TorchConfig(backend=...))"),
        ("environment", "RayLightningEnvironment"),
        ("members", "devices_per_worker"),
    ],
)
def test_what_does_not_go_is_refused(wrong: str, message: str, on_ray: Path) -> None:
    assert message in json.loads((on_ray / "refusals.json").read_text())[wrong]

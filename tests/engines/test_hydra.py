"""Sweeps of the main job by Hydra's plugins: jobs side by side, jobs of a scheduler, and a search by Optuna."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engines.servers import require
from tests.helpers.programs import ROOT, run_program

INSTALL = (
    "pip install hydra-joblib-launcher hydra-submitit-launcher hydra-optuna-sweeper, "
    "or pip install --target FOLDER and PYTHONPATH=FOLDER"
)
PACKAGES = [f"hydra_plugins.hydra_{name}" for name in ("joblib_launcher", "submitit_launcher", "optuna_sweeper")]
TIMEOUT_SECONDS = 500
SMALL = [
    "model.depth=26", "model.width_multiplier=0.125", "threads=1", "data.limit=40", "data.limit_test=10",
    "trainer.accelerator=cpu", "trainer.max_epochs=1", "strategy.min_blocks=1", "callbacks.progress_bar=null",
]  # fmt: skip
FORKED = "strategy.start_method=fork"  # a spawned worker is a new interpreter; one test covers it

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS + 60)


def sweep(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The results of a sweep's jobs, by their number."""
    require(INSTALL, packages=PACKAGES)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = str(ROOT / "experiments" / "train.py")
    arguments = ("-m", *SMALL, *arguments, f"hydra.sweep.dir={folder}")
    run_program([program, *arguments], ROOT, timeout=TIMEOUT_SECONDS, PYTHONPATH=path)
    files = sorted(folder.glob("*/results.json"), key=lambda file: int(file.parent.name))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", FORKED],
    ],
    ids=["joblib", "submitit"],
)
def test_two_jobs_at_the_same_time(launcher: list[str], tmp_path: Path) -> None:
    """Workers spawned in a process of joblib did not start: they inherited its start method, ``loky``."""
    results = sweep(tmp_path, "strategy.local_steps=2,3", *launcher)
    assert [result["rounds"] for result in results] == [3, 2]
    assert [result["workers"] for result in results] == [2, 2]


def test_a_search_by_optuna(tmp_path: Path) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    results = sweep(tmp_path, "strategy.local_steps=choice(2,3)", "optimizer.lr=interval(0.01,0.1)", *search, FORKED)
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())["best_value"]
    assert len(results) == 2
    assert best == max(result["test"]["accuracy"] for result in results)

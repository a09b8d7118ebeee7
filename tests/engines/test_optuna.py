"""A study of Optuna whose trials have two workers: the program of the page, with each way to start workers."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.engines.servers import require
from tests.helpers.programs import ROOT, run_program

INSTALL = "pip install optuna, or pip install --target FOLDER and PYTHONPATH=FOLDER"
PROGRAM = str(ROOT / "docs" / "examples" / "optuna_pruning.py")
TIMEOUT_SECONDS = 500

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS + 60)

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    ("launcher", "start_method", "studies"),
    [([], "spawn", 1), ([], "fork", 1), ([], "popen", 2), (TORCHRUN, "popen", 2)],
    ids=["spawn", "fork", "popen", "torchrun"],
)
def test_a_pruned_trial_stops_on_all_workers_and_the_next_one_trains(
    launcher: list[str], start_method: str, studies: int, tmp_path: Path
) -> None:
    require(INSTALL, packages=["optuna"])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [*launcher, PROGRAM, start_method, "4"]
    output = run_program(arguments, tmp_path, timeout=TIMEOUT_SECONDS, PYTHONPATH=path)
    # Each study logs each of its trials once, and all agree.
    trials = re.findall(r"Trial (\d) (pruned|finished with value: \S+)", output)
    told = dict(trials)
    assert sorted(trials) == sorted(list(told.items()) * studies)
    assert [told[number].partition(" ")[0] for number in "0123"] == ["finished", "pruned", "pruned", "finished"]

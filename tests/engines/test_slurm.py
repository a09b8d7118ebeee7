"""Trainings under SLURM, by the files of docs/examples, on a cluster of one node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.servers import require
from tests.engines.slurm.one_node import INSTALL, PROGRAMS, Cluster, one_node

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "docs" / "examples"
TWO = ("--nodes=1", "--ntasks-per-node=2")

EPOCHS = 4  # the default of train.py

SLOWLY = """
import runpy
import time

from torch.utils.data import TensorDataset

usual = TensorDataset.__getitem__

def read(self, index):
    time.sleep({seconds})
    return usual(self, index)

TensorDataset.__getitem__ = read
if __name__ == "__main__":
    runpy.run_path({script!r}, run_name="__main__")
"""
"""Runs the page's training script with slow reads of the data: it takes longer, and its weights stay the same."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require(INSTALL, PROGRAMS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patched.setenv("PYTHONPATH", str(ROOT))
        patched.setenv("OMP_NUM_THREADS", "1")
        with one_node(tmp_path_factory.mktemp("slurm")) as running:
            yield running


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of a training under srun."""
    folder = tmp_path_factory.mktemp("unbroken")
    output = srun(cluster, folder, "--devices", "2")
    assert "ResISTStrategy: 8 residual blocks are partitioned over 2 worker(s)" in output
    assert output.count("Handling auto-requeue") == 0
    return final_weights(folder)


def srun(cluster: Cluster, folder: Path, *arguments: str) -> str:
    shutil.copy(FILES / "train.py", folder)
    command = ["srun", *TWO, "python", "train.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=cluster.variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(cluster: Cluster, folder: Path, *options: str, seconds_per_sample: float) -> str:
    """Submit the batch file of the page; returns the job's number. Options of the command line override the file's."""
    shutil.copy(FILES / "train.sbatch", folder)
    script = SLOWLY.format(seconds=seconds_per_sample, script=str(FILES / "train.py"))
    (folder / "train.py").write_text(script)
    return cluster.ask("sbatch", "--parsable", *options, "train.sbatch", folder=folder).strip()


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("runs/*/final.ckpt")
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    assert weights
    return weights


def await_text(path: Path, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text() if path.exists() else f"no {path.name}"
        time.sleep(0.2)


def assert_equal_to_the_bit(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def test_a_job_that_its_time_limit_requeues_ends_as_an_unbroken_one(
    cluster: Cluster, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # SLURM looks every 30 s, so the signal comes 60 to 90 s after the start.
    seconds_per_sample = 120 / (EPOCHS * 2048 / 2)
    number = submit(cluster, tmp_path, "--time=2", "--signal=SIGUSR1@30", seconds_per_sample=seconds_per_sample)
    job = cluster.await_end(number, 700)
    log = (tmp_path / f"resist-{number}.log").read_text()

    assert job["JobState"] == "COMPLETED", log
    assert job["Restarts"] == "1"
    assert log.count("SIGUSR1: all workers save a checkpoint when this round ends") == 1
    assert "hpc_ckpt_1.ckpt" in log  # from which it resumed
    assert "DataLoader worker" not in log
    assert_equal_to_the_bit(final_weights(tmp_path), unbroken)


def test_sigterm_to_the_whole_step_stops_all_together_and_the_next_start_goes_on(
    cluster: Cluster, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    number = submit(cluster, tmp_path, seconds_per_sample=0.005)
    log = tmp_path / f"resist-{number}.log"
    await_text(log, "SLURM auto-requeueing enabled")
    time.sleep(3)  # in the midst of an epoch, with loader processes at work
    cluster.ask("scancel", "--signal=TERM", f"{number}.0")
    job = cluster.await_end(number, 60)
    text = log.read_text()

    assert job["JobState"] == "FAILED"
    assert "SIGTERM: all workers stop when this round ends" in text
    assert "DataLoader worker" not in text
    assert "Exited with exit code 143" in text
    assert (tmp_path / "runs" / number / "on_exception.ckpt").exists()

    cluster.ask("scontrol", "requeue", number)
    assert cluster.await_end(number, 300)["JobState"] == "COMPLETED", log.read_text()
    assert_equal_to_the_bit(final_weights(tmp_path), unbroken)


def test_wrong_numbers_of_tasks_are_told_within_seconds(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copy(FILES / "train.py", tmp_path)
    commands = {
        "no srun": ("python train.py --devices 2", "srun did not start this process"),
        "fewer": ("srun --ntasks=1 python train.py --devices 2", "srun has started 1 task(s)"),
        "devices": ("srun python train.py", "HINT: Set `devices=2`"),
        "nodes": ("srun python train.py --devices 2 --nodes 2", "HINT: Set `num_nodes=1`"),
    }
    lines = [f"{command} > '{name}' 2>&1 &" for name, (command, _) in commands.items()]
    (tmp_path / "wrong.sbatch").write_text("\n".join(["#!/bin/bash", *lines, "wait"]))
    number = cluster.ask("sbatch", "--parsable", "--overcommit", *TWO, "wrong.sbatch", folder=tmp_path).strip()
    cluster.await_end(number, 200)
    for name, (_, said) in commands.items():
        assert said in (tmp_path / name).read_text(), name

    command = ["srun", "--ntasks=2", "python", "train.py", "--devices", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=cluster.variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Use `--ntasks-per-node=2` instead" in done.stderr

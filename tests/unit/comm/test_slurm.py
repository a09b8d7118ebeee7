"""SLURM's variables, as set by version 22.05; ``tests/engines/test_slurm.py`` runs a real SLURM."""

from __future__ import annotations

import pytest

from resist_lightning.comm.slurm import check_tasks

BATCH_SCRIPT = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}
TASK = {**BATCH_SCRIPT, "SLURM_STEP_ID": "0"}


def test_as_many_tasks_as_the_trainer_expects_are_fine() -> None:
    check_tasks(TASK, 2, 1)
    check_tasks(TASK, 1, 2)
    check_tasks({**BATCH_SCRIPT, "SLURM_NTASKS": "1"}, 1, 1)  # one process needs no srun


def test_a_process_of_the_batch_script_is_told_to_use_srun() -> None:
    with pytest.raises(ValueError, match=r"allocated 2 tasks, but srun did not start this process.*'srun python"):
        check_tasks(BATCH_SCRIPT, 2, 1)


def test_a_step_with_another_number_of_tasks_than_its_job_is_refused() -> None:
    said = r"started 1 task\(s\).*devices=2, num_nodes=1\) expects 2.*--nodes=1 --ntasks-per-node=2"
    with pytest.raises(ValueError, match=said):
        check_tasks({**TASK, "SLURM_NTASKS": "1"}, 2, 1)  # the job's --ntasks-per-node=2 stays in the environment
    with pytest.raises(ValueError, match=r"started 2 task\(s\).*expects 1\."):
        check_tasks(TASK, 1, 1)

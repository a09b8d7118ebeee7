"""Checks the number of SLURM's tasks against the Trainer's settings. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping


def check_tasks(variables: Mapping[str, str], devices: int, nodes: int) -> None:
    """Check that SLURM has started as many tasks as the Trainer expects.

    Lightning compares its settings with the request of the *job*. A step may have fewer tasks, and a process of the
    batch script is no task at all: it would wait for the others until the timeout, or train alone and say nothing.

    Args:
        variables: the environment of this process.
        devices: of ``Trainer(devices=...)``, for each node.
        nodes: of ``Trainer(num_nodes=...)``.

    Raises:
        ValueError: if the numbers differ, or this process was not started by srun.
    """
    expected = devices * nodes
    tasks = int(variables.get("SLURM_NTASKS", "1"))
    if expected > 1 and "SLURM_STEP_ID" not in variables:
        raise ValueError(
            f"SLURM has allocated {tasks} tasks, but srun did not start this process, so the other processes will "
            "never start: it was started by the batch script itself, or in a shell of salloc. Put srun before the "
            "command, as in 'srun python train.py'."
        )
    if tasks != expected:
        raise ValueError(
            f"srun has started {tasks} task(s) (SLURM_NTASKS), but Trainer(devices={devices}, num_nodes={nodes}) "
            f"expects {expected}. Start that many: srun --nodes={nodes} --ntasks-per-node={devices}; or set devices "
            "and num_nodes to match srun."
        )

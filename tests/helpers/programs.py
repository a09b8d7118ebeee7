"""Runs whole programs, as a user starts them."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.helpers.interpreters import warm
from tests.helpers.processes import run_workers_to_the_end

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


def run_interpreter(arguments: list[str], folder: Path, *, timeout: float = 100, **environment: str) -> str:
    """`run_program` with real interpreters, for children too: each takes five seconds of CPU to start."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=_variables(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output}"
    return output


def run_program(arguments: list[str], folder: Path, *, timeout: float = 100, **environment: str) -> str:
    """Run a Python program in ``folder`` and return its output; it and its children are gone afterwards.

    It is a fork of a process that has imported Lightning, and so are the interpreters that it starts (`interpreters`).

    Args:
        arguments: of the interpreter.
        folder: in which it runs.
        timeout: seconds after which it is killed.
        environment: variables, beside those of this process.

    Raises:
        AssertionError: it did not end with exit code 0; with its output.
    """
    return _run(_be_shell, arguments, str(folder), _variables(environment), timeout=timeout)


def run_module(name: str, *arguments: str, timeout: float = 200, **environment: str) -> str:
    """`run_program`, as ``python -m name arguments`` in the repository's root."""
    return run_program(["-m", name, *arguments], ROOT, timeout=timeout, **environment)


def _variables(more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def _be_shell(arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    warm()
    subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, check=True)


def run_torchrun(target: Callable[..., None], *args: Any, max_restarts: int, timeout: float = 200) -> str:
    """Call ``target(*args)`` in two workers that torchrun's agent forks; returns the output.

    Like ``torchrun --nproc-per-node=2 --max-restarts=...``, without an interpreter for each worker of each attempt.

    Raises:
        AssertionError: the agent did not end with exit code 0; with the output.
    """
    return _run(_be_agent, target, args, max_restarts, timeout=timeout)


def _run(be_main: Callable[..., None], *args: Any, timeout: float) -> str:
    """Run a main process to its end and return its output."""
    with tempfile.TemporaryDirectory(prefix="run_main_") as folder:
        output = Path(folder, "output")
        (outcome,) = run_workers_to_the_end(_redirected, 1, be_main, str(output), args, timeout=timeout)
        printed = output.read_text()
    assert outcome.end == "exit code 0", f"{outcome.end}:\n{printed}\n{outcome.traceback}"
    return printed


def _redirected(_: int, be_main: Callable[..., None], output: str, args: tuple[Any, ...]) -> None:
    as_a_main_process()
    write_to(output)
    be_main(*args)


def as_a_main_process() -> None:
    """Leave the group of ``run_workers``, to become a main process that starts workers itself."""
    dist.destroy_process_group()
    for variable in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)


def write_to(output: str) -> None:
    """Redirect the output of this process and its children to a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def be_program(name: str, *arguments: str) -> None:
    """Become ``python -m name arguments``; for a main process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise


def _be_agent(target: Callable[..., None], args: tuple[Any, ...], max_restarts: int) -> None:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=max_restarts, start_method="fork", run_id="none",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    elastic_launch(config, be_worker)(target, args)


def be_worker(target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call ``target(*args)`` in a process that torchrun's agent has forked."""
    rank_zero_only.rank = int(os.environ["RANK"])  # as if Lightning had been imported with this variable
    return target(*args)


def refusal(program: Callable[[], object], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a program that refuses its command line, with exit code 2 and no file in ``folder``."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            program()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.err.count("\n") == 1
    assert not told.out
    assert not list(folder.iterdir())
    return told.err

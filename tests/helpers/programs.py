"""Whole programs, as a user starts them."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.processes import run_workers_to_the_end

ROOT = Path(__file__).resolve().parents[2]


def run_program(arguments: list[str], folder: Path, *, timeout: float = 100, **environment: str) -> str:
    """Run a Python program in ``folder`` and return what it printed; it and its children are gone afterwards.

    Raises:
        AssertionError: it did not end with exit code 0; with its output.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=variables,
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


def run_module(name: str, *arguments: str, timeout: float = 200, path: Path = ROOT, **environment: str) -> str:
    """As ``python -m name arguments`` in the repository's root, in a fork of a process that has imported Lightning.

    An interpreter takes five seconds of CPU for that. Functions registered with ``atexit`` are not called.

    Args:
        name: of the module.
        arguments: of its command line.
        timeout: seconds after which it is killed.
        path: a folder of more modules.
        environment: variables, beside those of this process.

    Raises:
        AssertionError: it did not come to its end; with its output.
    """
    with tempfile.TemporaryDirectory(prefix="run_module_") as folder:
        output = Path(folder, "output")
        call = name, arguments, str(output), str(path), environment
        (outcome,) = run_workers_to_the_end(_as_main, 1, *call, timeout=timeout)
        printed = output.read_text()
    assert outcome.end == "exit code 0", f"{outcome.end}:\n{printed}\n{outcome.traceback}"
    return printed


def as_a_main_process() -> None:
    """Leave the group of ``run_workers``: what follows starts the workers."""
    dist.destroy_process_group()
    for variable in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)


def _as_main(
    _: int, name: str, arguments: tuple[str, ...], output: str, path: str, environment: dict[str, str]
) -> None:
    as_a_main_process()
    os.environ.update(OMP_NUM_THREADS="1", **environment)
    os.chdir(ROOT)
    sys.path.append(path)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tempfile.tempdir = None  # TMPDIR may be another one now
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise


def refusal(program: Callable[[], object], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program says that refuses its command line: one line, exit code 2, and nothing is done in ``folder``."""
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

"""Whole programs, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

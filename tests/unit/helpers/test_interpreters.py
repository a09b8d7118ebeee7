"""Interpreters that are forks behave like others, for their parents and for their programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.interpreters import warm
from tests.helpers.processes import run_workers
from tests.helpers.programs import as_a_main_process

PROGRAM = """
import os, signal, subprocess, sys
import lightning
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("A_VARIABLE"), os.getppid(), os.getsid(0) == os.getpid())
print(input(), file=sys.stderr)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "fail":
    raise KeyError("a mistake")
if sys.argv[1] == "outer":
    sys.exit(subprocess.run([sys.executable, sys.argv[0], "inner"], input="below", text=True).returncode + 1)
sys.exit(int(sys.argv[1] == "inner") * 4)
"""


def start(_: int, folder: str) -> list[Any]:
    as_a_main_process()
    warm()
    found: list[Any] = [os.getpid()]
    for how, session in (("end", True), ("kill", False), ("fail", False), ("outer", False)):
        done = subprocess.run(
            [sys.executable, "program.py", how], cwd=folder, env={**os.environ, "A_VARIABLE": how}, input="said",
            text=True, capture_output=True, check=False, start_new_session=session,
        )  # fmt: skip
        found.append((done.returncode, done.stdout, done.stderr))
    found.append(subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True, check=True).stdout)
    return found


def test_programs_run_as_in_interpreters_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ((pid, end, killed, failed, outer, another),) = run_workers(start, 1, str(tmp_path))

    assert end == (0, f"__main__ ['end'] {tmp_path} end {pid} True\n", "said\n")
    assert killed[0] == -signal.SIGKILL
    assert failed[0] == 1
    assert failed[2].endswith("KeyError: 'a mistake'\n")
    assert outer[0] == 5
    assert outer[2] == "said\nbelow\n"
    assert "['inner']" in outer[1]
    assert another == b"5\n"  # a real interpreter, as it has no file

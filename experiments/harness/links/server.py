"""The server in a namespace: imports the workers' program once, and forks its processes for every measurement.

Importing torch and Lightning takes longer than a short measurement. Nothing computes before the fork, so no thread is
lost in it, and every measurement begins with the same memory.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from experiments.harness.links.workers import Place

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the program that started this worker has ended")


def work(program: Any, task: str, server: int) -> int:
    """In the forked process: the measurement. Returns the exit code."""
    try:
        end_with(server)
        content = json.loads(Path(task).read_text())
        place = Place(**content["place"])
        os.environ.update(RANK=str(place.worker), LOCAL_RANK=str(place.worker % place.per_node))
        program.main(place, content["settings"])
    except BaseException:  # noqa: BLE001 - whatever it is, it must not go on in a copy of the server
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # blocked while it was started
    end_with(int(sys.argv[2]))
    program = importlib.import_module(sys.argv[1])
    server = os.getpid()
    while line := sys.stdin.readline():
        tasks = line.split()
        for task in tasks:
            if os.fork() == 0:
                code = work(program, task, server)
                sys.stdout.flush()
                os._exit(code)  # nothing of the server may run in the fork, its handlers at exit neither
        for _ in tasks:
            _, status = os.wait()
            if status:  # the others end with this process
                sys.exit(abs(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()

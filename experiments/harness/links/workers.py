"""Worker processes on a network: started, shaped while they measure, never left behind.

The links carry what is measured and nothing else: they are shaped when all workers are *ready* (the start-up broadcast
is over), and the limit is lifted when all have *measured* (before the full model is assembled).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness.links.namespaces import Loopback, interface_bytes, terminable, undisturbed
from experiments.harness.settings import Failure

ROOT = Path(__file__).resolve().parents[3]
POLL_SECONDS = 0.01


class WorkersFailed(Failure):
    """A worker failed, or the time was up; with the end of its output."""


@dataclass(frozen=True)
class Place:
    """Where a worker finds itself: a worker's side of `LinkedWorkers.run`."""

    worker: int  # its number
    workers: int  # how many there are
    folder: str  # where workers and those who started them leave word for each other
    interface: str  # what its bytes travel through
    counts: bool  # whether the interface's counters are its own

    def ready(self) -> None:
        """Say that the start-up is over, and wait until all have; then the links are shaped."""
        self._say("ready")

    def measured(self) -> tuple[int, int] | None:
        """Say that nothing is sent any more; return what `bytes` says when that is so of all, before anything else is."""
        self._say("measured")
        counted = self.bytes()
        self._say("counted")
        return counted

    def bytes(self) -> tuple[int, int] | None:
        """What the kernel has counted so far, sent and received; None on a loopback that all share."""
        return interface_bytes(self.interface) if self.counts else None

    def report(self, result: dict[str, Any]) -> None:
        """Leave the worker's result, last of all."""
        made = Path(self.folder) / f"making.{self.worker}"
        made.write_text(json.dumps(result))
        made.rename(Path(self.folder) / f"result.{self.worker}")  # it appears whole

    def _say(self, sign: str) -> None:
        (Path(self.folder) / f"{sign}.{self.worker}").touch()
        answer = Path(self.folder) / sign
        while not answer.exists():
            time.sleep(POLL_SECONDS)


class LinkedWorkers:
    """The workers of a network; make it with `linked_workers`."""

    def __init__(self, network: Loopback, folder: Path, threads: int) -> None:
        self.network = network
        self.threads = threads
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._runs = 0

    def start(self, module: str) -> None:
        """Start a server (see `server`) for every worker."""
        for worker in range(self.network.workers):
            command = [sys.executable, "-m", "experiments.harness.links.server", module, str(os.getpid())]
            with (self.folder / f"output.{worker}").open("wb") as output, undisturbed():
                self.processes.append(
                    # Not interrupted here: a process that is started and not yet in the list would be left behind.
                    subprocess.Popen(
                        [*self.network.command(worker), *command],
                        env=_environment(self.network, worker, self.threads),
                        cwd=ROOT,
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def run(self, settings: dict[str, Any], *, gbit: float | None, timeout: float) -> dict[str, Any]:
        """Have all workers measure once, over links of this bandwidth; return what they and the shapers report.

        The settings are for the workers' program, which calls ``ready``, ``measured`` and ``report`` of its place. After
        ``timeout`` seconds all are killed.
        """
        folder = self.folder / f"run.{self._runs}"
        folder.mkdir()
        self._runs += 1
        deadline = time.monotonic() + timeout
        for worker, process in enumerate(self.processes):
            place = Place(worker, self.network.workers, str(folder), self.network.interface, self.network.counts)
            task = folder / f"task.{worker}.json"
            task.write_text(json.dumps({"place": vars(place), "settings": settings}))
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: _await says why
                process.stdin.write(f"{task}\n".encode())
                process.stdin.flush()
        self._await("ready", folder, deadline)
        self.network.shape(gbit)
        (folder / "ready").touch()
        self._await("measured", folder, deadline)
        shapers = self.network.shapers()  # while nobody sends: before the workers are told that all have measured
        (folder / "measured").touch()
        self._await("counted", folder, deadline)  # what is sent from now on is in no count
        self.network.shape(None)
        (folder / "counted").touch()
        self._await("result", folder, deadline)
        reports = [json.loads((folder / f"result.{i}").read_text()) for i in range(self.network.workers)]
        return {"workers": reports, "shapers": shapers}

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()

    def _await(self, sign: str, folder: Path, deadline: float) -> None:
        workers = range(len(self.processes))
        while not all((folder / f"{sign}.{worker}").exists() for worker in workers):
            ended = [worker for worker in workers if self.processes[worker].poll() is not None]
            if ended:
                code = self.processes[ended[0]].returncode
                raise WorkersFailed(f"worker {ended[0]} ended with code {code}:\n{self._tail(ended[0])}")
            if time.monotonic() > deadline:
                tails = "\n".join(f"worker {worker}: {self._tail(worker, 5)}" for worker in workers)
                raise WorkersFailed(f"not done within timeout_seconds, so the workers were killed:\n{tails}")
            time.sleep(POLL_SECONDS)

    def _tail(self, worker: int, lines: int = 30) -> str:
        return "\n".join((self.folder / f"output.{worker}").read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def linked_workers(network: Loopback, module: str, threads: int = 1) -> Iterator[LinkedWorkers]:
    """The workers, for as long as the context lasts: then all are dead, also after an error, Ctrl-C or a SIGTERM.

    ``main(place, settings)`` of the module is called for every measurement.
    """
    with terminable(), tempfile.TemporaryDirectory(prefix="links_") as folder:
        made = LinkedWorkers(network, Path(folder), threads)
        try:
            made.start(module)
            yield made
        finally:
            with undisturbed():
                made.end()
                network.shape(None)


def _environment(network: Loopback, worker: int, threads: int) -> dict[str, str]:
    """As torchrun would set it, every worker being a host of its own."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # Without it, Lightning gives a worker that is alone on its host all cores, whatever torch.set_num_threads said.
        "OMP_NUM_THREADS": str(threads),
        "RANK": str(worker),
        "GROUP_RANK": str(worker),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(network.workers),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": network.address,
        "MASTER_PORT": str(network.port),
        "TORCHELASTIC_RUN_ID": "links",
        "GLOO_SOCKET_IFNAME": network.interface,
        "CUDA_VISIBLE_DEVICES": "",
    }

"""Worker processes on a network: started, shaped while they measure, never left behind.

The links are shaped for the measurement only: when all workers are *ready* (the start-up broadcast is over), and the
limit is lifted when all have *measured* (before the full model is assembled).
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
    """A worker's place in the network, and its side of `LinkedWorkers.run`."""

    worker: int  # its number, torch's rank
    workers: int  # number of workers
    per_node: int  # number of workers, with consecutive numbers, that share a namespace and its link
    folder: str  # folder of messages between the workers and the starting process
    interface: str  # network interface of its traffic
    counts: bool  # whether the interface's counters are its own

    @property
    def nodes(self) -> int:
        """Number of namespaces."""
        return self.workers // self.per_node

    def ready(self) -> None:
        """Say that the start-up is over, and wait until all have; then the links are shaped."""
        self._say("ready")

    def measured(self) -> tuple[int, int] | None:
        """Say that the measured part is over; returns `bytes` when it is over for all, before anything else is sent."""
        self._say("measured")
        counted = self.bytes()
        self._say("counted")
        return counted

    def bytes(self) -> tuple[int, int] | None:
        """Bytes that the kernel has counted so far, sent and received; None on a loopback that all share."""
        return interface_bytes(self.interface) if self.counts else None

    def report(self, result: dict[str, Any]) -> None:
        """Write the worker's result, last of all."""
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

    def __init__(self, network: Loopback, folder: Path, threads: int, per_node: int) -> None:
        self.network = network
        self.threads = threads
        self.per_node = per_node
        self.count = network.workers * per_node
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._runs = 0

    def start(self, module: str) -> None:
        """Start a server (see `server`) in every namespace."""
        for node in range(self.network.workers):
            command = [sys.executable, "-m", "experiments.harness.links.server", module, str(os.getpid())]
            with (self.folder / f"output.{node}").open("wb") as output, undisturbed():
                self.processes.append(
                    # Not interrupted here: a process that is started and not yet in the list would be left behind.
                    subprocess.Popen(
                        [*self.network.command(node), *command],
                        env=self._environment(node),
                        cwd=ROOT,
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def run(self, settings: dict[str, Any], *, gbit: float | None, timeout: float) -> dict[str, Any]:
        """Have all workers measure once, over links of this bandwidth; returns their reports, and the shapers'.

        The settings are for the workers' program, which calls ``ready``, ``measured`` and ``report`` of its place. After
        ``timeout`` seconds all are killed.
        """
        folder = self.folder / f"run.{self._runs}"
        folder.mkdir()
        self._runs += 1
        deadline = time.monotonic() + timeout
        for node, process in enumerate(self.processes):
            tasks = [self._write_task(node * self.per_node + place, folder, settings) for place in range(self.per_node)]
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: _await says why
                process.stdin.write(f"{' '.join(tasks)}\n".encode())
                process.stdin.flush()
        self._await("ready", folder, deadline)
        self.network.shape(gbit)
        (folder / "ready").touch()
        self._await("measured", folder, deadline)
        shapers = self.network.shapers()  # while nobody sends: before the workers are told that all have measured
        (folder / "measured").touch()
        self._await("counted", folder, deadline)  # bytes sent from now on are in no count
        self.network.shape(None)
        (folder / "counted").touch()
        self._await("result", folder, deadline)
        reports = [json.loads((folder / f"result.{i}").read_text()) for i in range(self.count)]
        return {"workers": reports, "shapers": shapers}

    def end(self) -> None:
        """Kill the processes that still run."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()

    def _write_task(self, worker: int, folder: Path, settings: dict[str, Any]) -> str:
        network = self.network
        place = Place(worker, self.count, self.per_node, str(folder), network.interface, network.counts)
        task = folder / f"task.{worker}.json"
        task.write_text(json.dumps({"place": vars(place), "settings": settings}))
        return str(task)

    def _await(self, sign: str, folder: Path, deadline: float) -> None:
        nodes = range(len(self.processes))
        while not all((folder / f"{sign}.{worker}").exists() for worker in range(self.count)):
            ended = [node for node in nodes if self.processes[node].poll() is not None]
            if ended:
                code = self.processes[ended[0]].returncode
                raise WorkersFailed(f"{self._who(ended[0])} ended with code {code}:\n{self._tail(ended[0])}")
            if time.monotonic() > deadline:
                tails = "\n".join(f"{self._who(node)}: {self._tail(node, 5)}" for node in nodes)
                raise WorkersFailed(f"not done within timeout_seconds, so the workers were killed:\n{tails}")
            time.sleep(POLL_SECONDS)

    def _who(self, node: int) -> str:
        return f"worker {node}" if self.per_node == 1 else f"a worker of node {node}"

    def _tail(self, node: int, lines: int = 30) -> str:
        return "\n".join((self.folder / f"output.{node}").read_text(errors="replace").splitlines()[-lines:])

    def _environment(self, node: int) -> dict[str, str]:
        """The environment as of torchrun, with a namespace as a host; the server adds variables of single processes."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            # Without it, Lightning gives a worker that is alone on its host all cores, whatever torch.set_num_threads said.
            "OMP_NUM_THREADS": str(self.threads),
            "RANK": str(node * self.per_node),  # for modules that read it at import
            "GROUP_RANK": str(node),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.per_node),
            "MASTER_ADDR": self.network.address,
            "MASTER_PORT": str(self.network.port),
            "TORCHELASTIC_RUN_ID": "links",
            "GLOO_SOCKET_IFNAME": self.network.interface,
            "CUDA_VISIBLE_DEVICES": "",
        }


@contextmanager
def linked_workers(network: Loopback, module: str, threads: int = 1, per_node: int = 1) -> Iterator[LinkedWorkers]:
    """The workers, for as long as the context lasts: then all are dead, also after an error, Ctrl-C or a SIGTERM.

    ``main(place, settings)`` of the module is called for every measurement, in ``per_node`` processes of each namespace.
    """
    with terminable(), tempfile.TemporaryDirectory(prefix="links_") as folder:
        made = LinkedWorkers(network, Path(folder), threads, per_node)
        try:
            made.start(module)
            yield made
        finally:
            with undisturbed():
                made.end()
                network.shape(None)

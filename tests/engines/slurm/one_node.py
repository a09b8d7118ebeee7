"""A SLURM cluster of one node on this machine, of Debian's packages: munged, slurmctld and slurmd in a folder.

``python -m tests.engines.slurm.one_node`` starts one to try things by hand, until Ctrl-C. It asks for root, as slurmd
does; a container will do: no systemd, no cgroups, no accounting. The machine's own SLURM, if any, is left alone.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INSTALL = "apt-get install --yes --no-install-recommends slurm-wlm munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CPUS = 4  # regardless of the machine: the tasks of tests wait most of the time

_PATIENCE_SECONDS = 60
_POLL_SECONDS = 0.2

_CONFIG = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
# Containers have no cgroups to write to. As with cgroups, a signal to a step reaches whatever its tasks have started.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Without it a node that has fewer processors than this file says is not used.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass
class Cluster:
    """A running cluster. Its commands need ``SLURM_CONF`` in the environment."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        """The environment for its commands."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str, folder: Path | None = None) -> str:
        """Run a command such as ``squeue``, which must succeed; returns its output."""
        done = subprocess.run(command, env=self.variables, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job: ``JobState``, ``Restarts``, ``ExitCode`` and more."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_end(self, number: str, seconds: float) -> dict[str, str]:
        """Wait for the end of a job; a requeued one starts at once, with more time.

        SLURM would delay it by two minutes. A busy machine may take so long to start Python that a short limit
        would signal it before it trains.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.job(number)
            if job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
                return job
            if job["JobState"] == "PENDING" and job.get("Reason") == "BeginTime":
                self.ask("scontrol", "update", f"JobId={number}", "StartTime=now", "TimeLimit=60")
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"job {number} still runs after {seconds:g} s: {self.job(number)}")


@contextmanager
def one_node(folder: Path) -> Iterator[Cluster]:
    """A cluster whose files are in ``folder``, for as long as the context lasts.

    Raises:
        RuntimeError: if a server does not start, with the end of its output.
    """
    host = socket.gethostname().partition(".")[0]
    controller, daemon = _free_ports(2)
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=host, folder=folder, controller=controller, daemon=daemon, cpus=CPUS))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    cluster = Cluster(folder)
    with ExitStack() as servers:
        # By force: munged insists on a folder that other users can enter, and this one may be closed to them.
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
        servers.enter_context(_server(cluster, munged, (folder / "munge.socket").exists))
        servers.enter_context(_server(cluster, ["slurmctld", "-D", "-f", str(config)], lambda: _state(cluster) != ""))
        servers.enter_context(_server(cluster, ["slurmd", "-D", "-f", str(config)], lambda: _state(cluster) == "idle"))
        try:
            yield cluster
        finally:
            # slurmd leaves running steps alone when it ends.
            subprocess.run(
                ["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=cluster.variables, check=False
            )
            subprocess.run(["scancel", "--user=root"], env=cluster.variables, check=False)
            _await(lambda: _jobs(cluster) == "")


@contextmanager
def _server(cluster: Cluster, command: list[str], ready: Callable[[], bool]) -> Iterator[None]:
    """Run a server in the foreground; it is ended with the context."""
    log = cluster.folder / f"{command[0]}.out"
    with log.open("w") as output:
        # A session of its own: a Ctrl-C must not end the servers before their jobs.
        process = subprocess.Popen(command, env=cluster.variables, stdout=output, stderr=output, start_new_session=True)
    try:
        if not _await(lambda: process.poll() is not None or ready()) or process.poll() is not None:
            raise RuntimeError(f"{command[0]} did not start: {' '.join(log.read_text().splitlines()[-5:])}")
        yield
    finally:
        process.terminate()
        process.wait(_PATIENCE_SECONDS)


def _state(cluster: Cluster) -> str:
    """The state of the node; empty without an answer."""
    asked = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.variables, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def _jobs(cluster: Cluster) -> str:
    return cluster.ask("squeue", "--noheader")


def _await(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; returns whether it came true in time."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _free_ports(count: int) -> list[int]:
    """Ports on which nothing listens."""
    probes = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="slurm_") as place, one_node(Path(place)):
        sys.stdout.write(f"export SLURM_CONF={place}/slurm.conf   # until Ctrl-C\n")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            signal.pause()

"""A host is lost, the others train on without it, and it comes back: ``python experiments/elastic/run.py``.

Three torchruns stand for three hosts. One is killed with its worker, and started again later.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.elastic import tables
from experiments.elastic.script import HOST, LOCAL_STEPS
from experiments.harness import cli
from experiments.harness.links.namespaces import free_port
from experiments.harness.record import write_record
from experiments.harness.settings import Failure, option
from experiments.harness.tables import show

ROOT = Path(__file__).resolve().parents[2]
QUICKLY = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"
LOST_HOST = 1


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/elastic")
    hosts: int = option(3, "torchruns", least=2, smoke=2)
    steps: int = option(150, "local steps of the whole training", least=1, smoke=80)
    seconds: float = option(0.4, "seconds that a worker sleeps after each local step", above=0, smoke=0.3)
    away: float = option(5.0, "seconds until the lost host comes back", least=0, smoke=0.0)
    limit: float = option(180.0, "seconds to wait for anything", above=0)


class Hosts:
    """The torchruns, one for each host; host 0 serves the rendezvous and is never lost."""

    def __init__(self, folder: Path, hosts: int, steps: int, seconds: float) -> None:
        self._arguments = [str(folder), str(steps), str(seconds)]
        self._folder = folder
        self._hosts = hosts
        self._port = free_port()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, host: int) -> None:
        rendezvous = f"--rdzv-conf=is_host={int(host == 0)},{QUICKLY}"
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{self._hosts}", "--nproc-per-node=1",
            "--max-restarts=20", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{self._port}", "--rdzv-id=elastic",
            rendezvous, "-m", "experiments.elastic.script", *self._arguments,
        ]  # fmt: skip
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", HOST: str(host)}
        with (self._folder / f"host-{host}.log").open("ab") as log:
            self._running[host] = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **variables}, stdout=log, stderr=log, start_new_session=True
            )

    def lose(self, host: int) -> None:
        """The host goes down: its agent and its worker are killed."""
        # The newest of the host's workers: earlier ones have ended, and their diaries are still there.
        worker = max(pid for pid, entries in diaries(self._folder).items() if entries[-1]["host"] == str(host))
        process = self._running.pop(host)
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        process.wait()

    def wait(self, limit: float) -> None:
        for process in self._running.values():
            process.wait(limit)

    def end(self) -> None:
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in diaries(self._folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def diaries(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The diary of each process, by its pid."""
    found = {}
    for path in folder.glob("diary-*.jsonl"):
        lines = path.read_text().split("\n")[:-1]  # the last may be half a line
        if lines:
            found[int(path.stem.partition("-")[2])] = [json.loads(line) for line in lines]
    return found


def wait_until(said: Callable[[], bool], what: str, limit: float) -> None:
    deadline = time.monotonic() + limit
    while not said():
        if time.monotonic() > deadline:
            raise Failure(f"{what} did not happen within {limit:g} s")
        time.sleep(0.2)


def trains(folder: Path, workers: int, after: float) -> bool:
    """Whether so many workers train that began after a time."""
    entries = [rows for rows in diaries(folder).values() if rows[0]["at"] > after and rows[0]["workers"] == workers]
    return len(entries) == workers


def change(folder: Path, at: float, workers: int) -> dict[str, Any]:
    """The cost of a change of the workers, from the diaries."""
    rows = list(diaries(folder).values())
    before = [entry for entries in rows for entry in entries if entries[0]["at"] < at]
    after = [entries[0] for entries in rows if entries[0]["at"] > at and entries[0]["workers"] == workers]
    first = min(entry["at"] for entry in after)
    last = max(entry["at"] for entry in before)
    return {
        "workers": workers,
        "seconds_until_training": max(entry["at"] for entry in after) - at,
        "seconds_without_training": first - last,
        "steps_lost": max(entry["step"] for entry in before) - (min(entry["step"] for entry in after) - 1),
        "first_step": min(entry["step"] for entry in after),
        "local_steps": LOCAL_STEPS,
    }


def lose_and_return(options: Options) -> dict[str, Any]:
    """A training; returns the costs of its two changes of the workers."""
    hosts, seconds, limit = options.hosts, options.seconds, options.limit
    with tempfile.TemporaryDirectory(prefix="elastic_") as name:
        folder = Path(name)
        torchruns = Hosts(folder, hosts, options.steps, seconds)
        try:
            for host in range(hosts):
                torchruns.start(host)
            wait_until(lambda: trains(folder, hosts, 0), "the beginning", limit)
            time.sleep(3 * LOCAL_STEPS * seconds)  # some rounds, so that there are snapshots
            lost_at = time.time()
            torchruns.lose(LOST_HOST)
            wait_until(lambda: trains(folder, hosts - 1, lost_at), "resuming without the lost host", limit)
            lost = change(folder, lost_at, hosts - 1)
            time.sleep(options.away)
            back_at = time.time()
            torchruns.start(LOST_HOST)
            wait_until(lambda: trains(folder, hosts, back_at), "taking the host in again", limit)
            back = change(folder, back_at, hosts)
            torchruns.wait(limit)
            finals = [torch.load(path, weights_only=True) for path in sorted(folder.glob("final-*.pt"))]
            return {
                "hosts": hosts,
                "lost": lost,
                "back": back,
                "finished": len(finals),
                "last_step": max(rows[-1]["step"] for rows in diaries(folder).values()),
                "weights_equal": all(
                    torch.equal(value, final[key]) for final in finals[1:] for key, value in finals[0].items()
                ),
            }
        except BaseException:
            for log in sorted(folder.glob("host-*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
            raise
        finally:
            torchruns.end()


def run(_: Sequence[str], options: Options) -> None:
    """Lose a host, take it in again, and write the costs."""
    record = lose_and_return(options)
    settings = options.take("hosts", "steps", "seconds", "away")
    write_record(Path(options.out) / "elastic.jsonl", {"settings": settings, "rendezvous": QUICKLY, **record})
    show(Path(options.out), tables.STUDIES, ["elastic"])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))

"""The cost of heartbeats for the store, and the time until a lost worker is known, with many workers.

python experiments/benchmarks/heartbeats.py                         (all parts, some three minutes)
python experiments/benchmarks/heartbeats.py size=smoke out=FOLDER   (to see that it works)

`counted`: all requests of S workers to the store in one beat, counted in a store that only counts, with the package's
own heartbeats and failure detectors; they must equal the closed form, or the command fails. `busy`: CPU time of a real
store (torch's TCPStore, in a process of its own) for such a beat, and for one of the former scheme, in which every
worker read all lines. `live`: real light processes on this machine, each with the package's watchdog and no training,
at one store; one is frozen, then in a second run one is killed. Prints tables and writes
experiments/benchmarks/results/heartbeats.jsonl.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from experiments.benchmarks import tables
from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show
from resist_lightning import WorkerLost
from resist_lightning.faults import heartbeats as heartbeats_module
from resist_lightning.faults.failure_detector import FailureDetector
from resist_lightning.faults.heartbeats import Heartbeats
from resist_lightning.faults.host import this_process
from resist_lightning.faults.messages import Heartbeat, Process
from resist_lightning.faults.surroundings import Surroundings
from resist_lightning.faults.watchdog import Watchdog

KEY = b"k" * 32
BUSY = Heartbeat(100, what="local steps", doing="local steps, round 12, local step 50", seconds=1.25, round=12, step=50)


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/benchmarks")
    counted: list[int] = option(
        [64, 256, 1000, 4096], "numbers of workers for which messages are counted", least=2, smoke=[2, 16]
    )
    busy: list[int] = option(
        [64, 256, 1000], "numbers of workers whose heartbeats a real store serves", least=2, smoke=[16]
    )
    beats: int = option(20, "heartbeats of each worker that the real store serves", least=1, smoke=2)
    processes: int = option(64, "real light processes", least=3, smoke=4)
    seconds: int = option(10, "seconds that the light processes run before one is lost", least=2, smoke=2)
    silence: float = option(10.0, "seconds of silence after which a worker counts as lost", least=3.0, smoke=3.0)


class CountingStore:
    """A stand-in for a store that counts requests, keys and bytes."""

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()

    def clone(self) -> CountingStore:
        return self

    def set_timeout(self, timeout: object) -> None:
        """A no-op: there is nothing to wait for."""

    def set(self, key: str, line: str) -> None:
        self.asked.update(requests=1, keys=1, bytes=len(line))
        self.lines[key] = line.encode()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        found = [self.lines[key] for key in keys]
        self.asked.update(requests=1, keys=len(keys), bytes=sum(map(len, found)))
        return found


def introduced(workers: int, name: str) -> list[Heartbeats]:
    """The heartbeats of all workers, eight to a host."""
    processes = [Process(each, f"node-{each // 8}", f"node-{each // 8}/boot", 1000 + each) for each in range(workers)]
    everybody = [Heartbeats(process, workers, name) for process in processes]
    for each in everybody:
        each.begin(processes, KEY)
    return everybody


def beat(everybody: Sequence[Heartbeats], detectors: Sequence[FailureDetector], number: int) -> None:
    """One second of all workers in which all is well, as the watchdog does it."""
    for each, detector in zip(everybody, detectors, strict=True):
        heartbeat = replace(BUSY, beat=number)
        detector.note_own(heartbeat, number)
        each.post(heartbeat)
        lines = each.read(detector.wanted())
        detector.hear(lines.heartbeats, number, lines.reports, lines.tampered)
        if detector.monitoring:
            each.publish(detector.report(number, detector.judge(number, {})))
        assert detector.judge(number, {}) is None


def operations_per_beat(workers: int) -> dict[str, int]:
    """Number of requests and keys of all workers together in a second in which all is well.

    Returns:
        Requests, and keys that they read or write. With each worker reading all lines, as before, these were
        ``2 S`` requests and ``S + S²`` keys.
    """
    monitors = min(workers, 2)
    posted = workers + monitors  # each worker's heartbeat, and the reports
    reports_read = workers * monitors
    heartbeats_read = monitors * (workers - 1)
    return {
        "requests": workers + monitors + workers,  # a worker reads by one request
        "keys": posted + reports_read + heartbeats_read,
    }


def count(workers: int) -> dict[str, int]:
    """Requests, keys and bytes of a beat; checked against the closed form."""
    store: Any = CountingStore()
    heartbeats_module.clone_store = store.clone
    everybody = introduced(workers, "counted")
    detectors = [FailureDetector(each.own.worker, each.processes, 30, "the store", 0) for each in everybody]
    beat(everybody, detectors, 1)
    store.asked.clear()
    beat(everybody, detectors, 2)
    expected = operations_per_beat(workers)
    assert {name: store.asked[name] for name in expected} == expected, (workers, store.asked, expected)
    return {"workers": workers, **store.asked, "former_keys": workers + workers**2}


def serve(ports: Any, ended: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ports.put(store.port)
    ended.wait()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    """A store in a process of its own."""

    def __enter__(self) -> Server:
        context = multiprocessing.get_context("fork")
        ports, self._ended = context.Queue(), context.Event()
        self._process = context.Process(target=serve, args=(ports, self._ended))
        self._process.start()
        self.port: int = ports.get()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._process.join()

    @property
    def cpu_seconds(self) -> float:
        assert self._process.pid is not None
        return cpu_seconds(self._process.pid)

    def connect(self) -> dist.TCPStore:
        return dist.TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False)


class Shared:
    """A connection to a store, shared by the heartbeats of many workers."""

    def __init__(self, store: dist.TCPStore) -> None:
        self.set, self.multi_get, self.set_timeout = store.set, store.multi_get, store.set_timeout

    def clone(self) -> Shared:
        return self


def serve_beats(workers: int, beats: int) -> dict[str, float]:
    """Seconds for which a real store is busy in one beat of all workers, in both schemes."""
    with Server() as server:
        client = server.connect()
        shared: Any = Shared(client)
        heartbeats_module.clone_store = shared.clone
        everybody = introduced(workers, "busy")
        detectors = [FailureDetector(each.own.worker, each.processes, 30, "the store", 0) for each in everybody]
        beat(everybody, detectors, 1)
        before = server.cpu_seconds
        for number in range(beats):
            beat(everybody, detectors, number + 2)
        busy = (server.cpu_seconds - before) / beats
        keys = [f"resist_lightning/heartbeats/busy/{worker}" for worker in range(workers)]
        line = client.get(keys[0])
        former_beats = max(1, min(beats, 4000 // workers))  # the cost of each is quadratic
        before = server.cpu_seconds
        for key in keys * former_beats:
            client.set(key, line)
            client.multi_get(keys)
        former = (server.cpu_seconds - before) / former_beats
    return {"workers": workers, "busy_seconds": busy, "former_busy_seconds": former}


def live(number: int, processes: list[Process], port: int, silence: float, found: Any) -> None:
    """A light worker: watches until one is lost, and reports when it knew."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    heartbeats_module.clone_store = store.clone
    own = this_process(number)
    heartbeats = Heartbeats(own, len(processes), "live")
    found.put((number, own.pid))
    while not all(store.check([f"resist_lightning/heartbeats/live/{each}"]) for each in range(len(processes))):
        time.sleep(0.2)
    pids = [int(store.get(f"pid/{each}")) for each in range(len(processes))]
    heartbeats.begin([replace(own, worker=each, pid=pid) for each, pid in enumerate(pids)], KEY)
    around = Surroundings(activity=lambda: None, store="the store", how_to_resume=lambda: "")
    watchdog = Watchdog(heartbeats, around, silence=silence, timeout=600)
    watchdog.start()
    while watchdog.verdict is None:
        time.sleep(0.02)
    found.put((number, time.monotonic(), watchdog.verdict.worker))
    watchdog.explain(WorkerLost())
    watchdog.post_end("gave up", watchdog.verdict.text)


def lose_one(options: Options, how: signal.Signals) -> dict[str, Any]:
    """Run light workers, lose one of them, and measure when the others know."""
    many = options.processes
    doomed = many // 2
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    with Server() as server:
        client = server.connect()
        processes = [replace(this_process(0), worker=worker) for worker in range(many)]
        started = []
        for number in range(many):
            arguments = number, processes, server.port, options.silence, found
            process = context.Process(target=live, args=arguments)
            process.start()
            assert process.pid is not None
            client.set(f"pid/{number}", str(process.pid))
            started.append(process)
        for _ in started:
            found.get(timeout=120)
        time.sleep(3)  # all have connected
        before, began = server.cpu_seconds, time.monotonic()
        time.sleep(options.seconds)
        busy = (server.cpu_seconds - before) / (time.monotonic() - began)
        lost_at = time.monotonic()
        pid = started[doomed].pid
        assert pid is not None
        os.kill(pid, how)
        knew = [found.get(timeout=options.silence + 60) for _ in range(many - 1)]
        os.kill(pid, signal.SIGKILL)
        for process in started:
            process.join()
    assert {worker for _, _, worker in knew} == {doomed}, knew
    seconds = sorted(at - lost_at for _, at, _ in knew)
    return {
        "how": how.name,
        "processes": many,
        "silence": options.silence,
        "store_busy": busy,
        "first_knew_seconds": seconds[0],
        "last_knew_seconds": seconds[-1],
    }


def run(_: Sequence[str], options: Options) -> None:
    """Measure; parts that fork come first, as long as there is no thread."""
    lost = [lose_one(options, how) for how in (signal.SIGSTOP, signal.SIGKILL)]
    print("measured: light processes", flush=True)
    busy = [serve_beats(workers, options.beats) for workers in options.busy]
    print("measured: a real store", flush=True)
    counted = [count(workers) for workers in options.counted]
    out = Path(options.out)
    settings = options.take("beats", "processes", "seconds", "silence")
    write_record(out / "heartbeats.jsonl", {"settings": settings, "counted": counted, "busy": busy, "lost": lost})
    show(out, tables.STUDIES, ["heartbeats"])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))

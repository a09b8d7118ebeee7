"""The watchdog with a store that anybody can write to, and that may not answer when the program ends."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from resist_lightning.faults import heartbeats as heartbeats_module
from resist_lightning.faults import watchdog as watchdog_module
from resist_lightning.faults.failure_detector import Heartbeat
from resist_lightning.faults.heartbeats import Heartbeats
from resist_lightning.faults.watchdog import Surroundings, Watchdog
from tests.helpers.processes import run_workers

KEY = "resist_lightning/heartbeats/test/1"
SOON_SECONDS = 5.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_garbage_and_a_removed_line_do_not_end_the_watchdog_and_the_end_of_the_program_does() -> None:
    assert run_workers(serve_or_watch, 2, timeout=40) == [None, None]


def serve_or_watch(worker: int) -> None:
    """Worker 1 serves a store, and is frozen for a while; worker 0 watches."""
    port_and_pid = torch.zeros(2, dtype=torch.int64)
    if worker == 1:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port_and_pid = torch.tensor([server.port, os.getpid()])
    dist.broadcast(port_and_pid, src=1)
    if worker == 0:
        port, pid = port_and_pid.tolist()
        watch_the_store(dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60)), pid)
    dist.barrier()


def watch_the_store(store: dist.TCPStore, server: int) -> None:
    heartbeats_module.clone_store = store.clone
    heartbeats_module.CONNECT_SECONDS, watchdog_module.BEAT_SECONDS = 0.2, 0.1
    around = Surroundings(activity=lambda: None, store="the store", how_to_resume=lambda: "")
    watchdog = Watchdog(Heartbeats(0, 2, "test"), around, silence=30, timeout=60)
    watchdog.start()
    for beat, line in enumerate(["no heartbeat", '{"worker": 1, "mood": 5}', None]):
        heartbeat = Heartbeat(1, "host", "elsewhere", pid=1, beat=beat)
        store.set(KEY, heartbeat.write())
        wait_for(lambda: watchdog._detector.heartbeats.get(1) == heartbeat)  # noqa: B023 - called at once
        mine = watchdog._own.beat
        if line is None:
            store.delete_key(KEY)
            time.sleep(0.4)  # a call waits for it
        else:
            store.set(KEY, line)
            wait_for(lambda: watchdog._own.beat > mine + 2)  # noqa: B023
    store.set(KEY, Heartbeat(1, "host", "elsewhere", pid=1, beat=9).write())
    wait_for(lambda: watchdog._detector.heartbeats[1].beat == 9)
    assert watchdog.verdict is None

    os.kill(server, signal.SIGSTOP)
    try:
        time.sleep(0.3)
        assert watchdog._beating.is_alive()
        atexit._run_exitfuncs()
        assert [thread.name for thread in threading.enumerate() if "resist_lightning" in thread.name] == []
    finally:
        os.kill(server, signal.SIGCONT)

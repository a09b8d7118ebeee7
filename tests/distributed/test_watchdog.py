"""The watchdog with a store to which anybody can write, and which may not answer when the program ends."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from resist_lightning.faults import heartbeats as heartbeats_module
from resist_lightning.faults import watchdog as watchdog_module
from resist_lightning.faults.heartbeats import Heartbeats, Lines
from resist_lightning.faults.host import this_process
from resist_lightning.faults.messages import Heartbeat, Process, to_line
from resist_lightning.faults.surroundings import Surroundings
from resist_lightning.faults.watchdog import Watchdog
from tests.helpers.processes import run_workers

PLACE = "resist_lightning/heartbeats/test/1"
KEY = b"k" * 32
ELSEWHERE = Process(1, "host", "elsewhere", pid=1)
PROCESSES = [Process(0, "here", "here", os.getpid()), ELSEWHERE]
SOON_SECONDS = 5.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_strangers_do_not_end_the_watchdog_and_the_end_of_the_program_does() -> None:
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
    watchdog, other = watching(0), Heartbeats(ELSEWHERE, 2, "test")
    other.begin(PROCESSES, KEY)
    watchdog.start()

    def post(beat: int) -> None:
        other.post(Heartbeat(beat))
        wait_for(lambda: watchdog._detector.heartbeats.get(1) == Heartbeat(beat))

    for beat, line in enumerate(["no heartbeat", to_line(Heartbeat(99, end="failed", text="a lie")), None], start=1):
        post(beat)
        mine, seen = watchdog._own.beat, watchdog._heartbeats.tampered_lines
        if line is None:
            store.delete_key(PLACE)
            time.sleep(0.4)  # meanwhile a call waits for it
        else:
            store.set(PLACE, line)
            wait_for(lambda: watchdog._own.beat > mine + 2)  # noqa: B023 - called at once
            wait_for(lambda: watchdog._heartbeats.tampered_lines > seen)  # noqa: B023
    post(9)
    assert watchdog.verdict is None

    strangers(int(store.port), store)
    post(10)
    assert watchdog.verdict is None

    os.kill(server, signal.SIGSTOP)
    try:
        time.sleep(0.3)
        assert watchdog._beating.is_alive()
        atexit._run_exitfuncs()
        assert [thread.name for thread in threading.enumerate() if "resist_lightning" in thread.name] == []
    finally:
        os.kill(server, signal.SIGCONT)


def test_at_a_good_end_nothing_is_read_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's server, worker 0, may be gone before it answers."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(heartbeats_module, "clone_store", server.clone)
    watchdog, other = watching(0), Heartbeats(ELSEWHERE, 2, "test")
    other.begin(PROCESSES, KEY)
    watchdog.start()
    read, ends = watchdog._heartbeats.read, []

    def reading(workers: Collection[int]) -> Lines:
        ends.append(watchdog._own.end)
        return read(workers)

    monkeypatch.setattr(watchdog._heartbeats, "read", reading)
    wait_for(lambda: len(ends) > 0)
    watchdog.post_end("done")
    assert "done" not in ends
    assert other.read([0]).heartbeats[0].end == "done"


def watching(worker: int) -> Watchdog:
    heartbeats = Heartbeats(this_process(worker), 2, "test")
    heartbeats.begin(PROCESSES, KEY)
    around = Surroundings(activity=lambda: None, store="the store", how_to_resume=lambda: "")
    return Watchdog(heartbeats, around, silence=30, timeout=60)


def strangers(port: int, store: dist.TCPStore) -> None:
    """Connect to the store as strangers who send nothing, garbage or HTTP, and hang up at any point."""
    idle = [socket.create_connection(("127.0.0.1", port), timeout=SOON_SECONDS) for _ in range(20)]
    for number, connection in enumerate(idle[:12]):
        connection.sendall([os.urandom(100), bytes(5000), b"GET / HTTP/1.1\r\n\r\n"][number % 3])
    for connection in idle[:6]:
        connection.close()
    store.set("asked meanwhile", "answered")
    assert store.get("asked meanwhile") == b"answered"
    for connection in idle[6:]:
        connection.close()

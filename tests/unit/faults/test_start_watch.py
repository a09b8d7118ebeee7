"""A worker that ends while the others wait for it; with real workers in ``tests/distributed/test_start.py``."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from resist_lightning.comm.group import connect_to_store
from resist_lightning.faults import start_watch
from resist_lightning.faults.host import this_process
from resist_lightning.faults.messages import Process, to_line
from resist_lightning.faults.start_watch import StartWatch

LONG = timedelta(seconds=20)
PLACE = "resist_lightning/start/0/2/1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_watch, "BEAT_SECONDS", 0.1)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[bytes], Process]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child, replace(this_process(0), pid=child.pid)
    child.kill()
    child.wait()


def watch_of(server: dist.TCPStore, worker: int = 1, orphaned: str = "", workers: int = 2) -> StartWatch:
    return StartWatch(this_process(worker), workers, "127.0.0.1", server.port, lambda: orphaned)


def wait_for_ever(server: dist.TCPStore) -> None:
    connect_to_store("127.0.0.1", server.port, LONG).get("what nobody writes")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (PLACE, "has ended while the workers were starting"),
        # The group before: worker 0 alone calls `test`, or saves, behind a training.
        ("resist_lightning/start/0/2/0", "has ended, and cannot take part in what this process begins now"),
    ],
)
def test_a_worker_that_ends_is_named_and_those_that_wait_for_it_raise(
    server: dist.TCPStore, other: tuple[subprocess.Popen[bytes], Process], place: str, text: str
) -> None:
    # The others waited until the timeout of the group, ten minutes.
    child, process = other
    server.set(f"{place}/0", to_line(process))
    watch = watch_of(server)
    began = time.monotonic()
    threading.Timer(0.3, child.kill).start()
    with pytest.raises(RuntimeError), watch:
        wait_for_ever(server)
    assert time.monotonic() - began > 0.3
    assert watch.lost.startswith(f"worker 0 (host {process.host}, pid {child.pid}) {text}")
    assert time.monotonic() - began < LONG.total_seconds() / 2
    assert not watch._thread.is_alive()
    # Workers on other hosts cannot see the process.
    elsewhere = watch_of(server)
    elsewhere._own = replace(elsewhere._own, home="elsewhere")
    with pytest.raises(RuntimeError), elsewhere:
        wait_for_ever(server)
    assert elsewhere.lost == watch.lost


def test_a_worker_without_the_process_that_started_it_does_not_wait_either(server: dist.TCPStore) -> None:
    watch = watch_of(server, orphaned="the parent has ended.")
    with pytest.raises(RuntimeError), watch:
        wait_for_ever(server)
    assert watch.lost == "the parent has ended."


@pytest.mark.parametrize("line", [b"\xff garbage", b"{}", b'{"worker": 0, "host": 1}'])
def test_garbage_in_the_store_keeps_nobody_from_starting(server: dist.TCPStore, line: bytes) -> None:
    server.set(f"{PLACE}/0", line)
    watch = watch_of(server)
    with watch:
        time.sleep(0.5)
    assert watch.lost == ""
    assert server.check([f"{PLACE}/1"])


def test_who_has_not_come_is_said(
    server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start_watch, "SLOW_SECONDS", 0.2)
    watch = watch_of(server, worker=0, workers=30)
    with watch:
        time.sleep(0.6)
    text = f"Of 30 ranks these have not reached the store at 127.0.0.1:{server.port}: 1, 2, 3"
    assert watch.missing().startswith(text)
    assert " 16 and 13 more. They were not started" in watch.missing()
    assert capfd.readouterr().err.count(text) == 1

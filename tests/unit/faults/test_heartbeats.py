"""Heartbeats in a store of this process; in ``tests/distributed/test_watchdog.py`` another process serves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from resist_lightning.faults import heartbeats
from resist_lightning.faults.heartbeats import Heartbeats, Lines
from resist_lightning.faults.messages import Heartbeat, Process, Report, to_line

KEY = b"k" * 32
PLACE = "resist_lightning/heartbeats/run/1"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    store = dist.HashStore()
    monkeypatch.setattr(heartbeats, "clone_store", store.clone)
    return store


def introduced(workers: int, name: str | None = "run") -> list[Heartbeats]:
    own = [Process(worker, "alpha", "alpha", 100 + worker) for worker in range(workers)]
    made = [Heartbeats(process, workers, name) for process in own]
    for each in made:
        each.begin(own, KEY)
    return made


def test_every_worker_reads_the_last_heartbeat_of_each_that_has_posted_one_and_the_reports() -> None:
    first, second, third = introduced(3)
    assert first.read([1, 2]) == Lines()
    first.post(Heartbeat(1))
    first.post(Heartbeat(2))
    first.publish(Report(5))
    assert third.read([0, 1]) == Lines({0: Heartbeat(2)}, {0: Report(5)})
    second.post(Heartbeat(1))
    second.publish(Report(6))
    assert first.read([1, 2]) == Lines({1: Heartbeat(1)}, {0: Report(5), 1: Report(6)})


def test_what_no_worker_has_posted_is_neither_believed_nor_missed(store: dist.HashStore) -> None:
    first, second = introduced(2)
    second.post(Heartbeat(1))
    second.publish(Report(1))
    signed = store.get(PLACE)
    assert first.read([1]) == Lines({1: Heartbeat(1)}, {1: Report(1)})
    for line in (b"garbage \xff", to_line(Heartbeat(2)).encode(), signed[:-1] + b" ", b""):
        store.set(PLACE, line)
        assert first.read([1]) == Lines({}, {1: Report(1)}, tampered={1})
    store.set(PLACE, signed)
    # A line from another key: a report in place of a heartbeat.
    store.set("resist_lightning/heartbeats/run/report/1", signed)
    assert first.read([1]) == Lines({1: Heartbeat(1)}, tampered={1})
    assert first.tampered_lines == 5


def test_after_an_error_a_line_that_is_gone_is_not_waited_for(store: dist.HashStore) -> None:
    first, second = introduced(2)
    second.post(Heartbeat(1))
    store.delete_key(PLACE)
    first.connect_again()
    assert first.read([1]) == Lines(tampered={1})
    second.post(Heartbeat(2))
    assert first.read([1]) == Lines({1: Heartbeat(2)})


def test_a_later_run_reads_nothing_of_the_one_before() -> None:
    for _ in range(2):
        (only,) = introduced(1, name=None)
        assert only.read([0]) == Lines()
        only.post(Heartbeat(1))
        assert only.read([0]) == Lines({0: Heartbeat(1)})


class Counting:
    """A store that counts requests and keys."""

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()

    def clone(self) -> Counting:
        return self

    def set_timeout(self, timeout: object) -> None:
        pass

    def set(self, key: str, line: str) -> None:
        self.asked += Counter(requests=1, keys=1)
        self.lines[key] = line.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.asked += Counter(requests=1, keys=len(keys))
        return [self.lines[key] for key in keys]


@pytest.mark.parametrize("workers", [2, 3, 64])
def test_a_beat_of_all_workers_costs_the_store_what_the_formula_says(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Counting()
    clone: Callable[[], Any] = store.clone
    monkeypatch.setattr(heartbeats, "clone_store", clone)
    everybody = introduced(workers)
    store.asked.clear()
    for each in everybody:
        each.post(Heartbeat(1))
        monitoring = each.own.worker in each.monitors
        each.read([other for other in range(workers) if monitoring and other != each.own.worker])
        if monitoring:
            each.publish(Report(1))
    assert store.asked == {"requests": 2 * workers + 2, "keys": 5 * workers}

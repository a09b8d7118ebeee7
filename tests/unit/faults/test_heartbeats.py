"""Heartbeats in a store of this process; ``tests/distributed/test_watchdog.py`` has one that another process serves."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from resist_lightning.faults import heartbeats
from resist_lightning.faults.heartbeats import Heartbeats


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    store = dist.HashStore()
    monkeypatch.setattr(heartbeats, "clone_store", store.clone)
    return store


def test_every_worker_reads_the_last_line_of_each_that_has_posted_one() -> None:
    first, second = Heartbeats(0, 3, "run"), Heartbeats(1, 3, "run")
    assert first.read() == {}
    first.post("began")
    first.post("goes on")
    assert second.read() == {0: b"goes on"}
    second.post("began")
    assert first.read() == second.read() == {0: b"goes on", 1: b"began"}


def test_after_an_error_a_line_that_is_gone_is_not_waited_for(store: dist.HashStore) -> None:
    first, second = Heartbeats(0, 2, "run"), Heartbeats(1, 2, "run")
    first.post("began")
    second.post("began")
    assert len(first.read()) == 2
    store.delete_key("resist_lightning/heartbeats/run/1")
    first.connect_again()
    assert first.read() == {0: b"began"}


def test_a_later_run_reads_nothing_of_the_one_before() -> None:
    Heartbeats(0, 2).post("began")
    assert Heartbeats(1, 2).read() == {}

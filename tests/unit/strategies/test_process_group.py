"""A strategy leaves the process group that it has joined, and no other."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment

from resist_lightning.comm.group import group_exists
from resist_lightning.strategies.launching.guard import Guard
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.process_group import ProcessGroup


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ProcessGroup]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))

    def joined() -> ProcessGroup:
        group = ProcessGroup(StrategyOptions(timeout=timedelta(seconds=20)))
        group.join(LightningEnvironment(), "gloo", torch.device("cpu"))
        return group

    return joined


def leave(group: ProcessGroup, said: list[str], *, interrupted: bool) -> None:
    group.leave(Guard(timedelta(seconds=30)), lambda: said.append("barrier"), interrupted=interrupted)


def test_only_who_has_made_the_group_leaves_it(join: Any) -> None:
    said: list[str] = []
    mine, other = join(), join()
    leave(other, said, interrupted=False)
    assert group_exists()
    assert said == []

    leave(mine, said, interrupted=False)

    assert not group_exists()
    assert said == ["barrier"]
    leave(mine, said, interrupted=False)  # a second time does nothing
    assert said == ["barrier"]


def test_after_an_error_nobody_waits_and_no_operation_stays_under_way(
    join: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("resist_lightning.strategies.process_group.abort_nccl", lambda: said.append("aborted"))
    leave(join(), said, interrupted=True)
    assert said == ["aborted"]
    dist.destroy_process_group()

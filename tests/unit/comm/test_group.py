"""Groups that cannot serve a worker's tensors are refused; joining and leaving is tested in ``tests/distributed``."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from resist_lightning.comm.group import (
    group_exists,
    interrupt_group,
    join_group,
    messages_sent,
)
from resist_lightning.comm.rendezvous import HostsCannotMeet


def test_a_process_without_a_group_has_sent_nothing():
    assert not group_exists()
    assert messages_sent() == 0


@pytest.mark.parametrize(
    ("backend", "variable"),
    [("gloo", "GLOO_SOCKET_IFNAME"), ("nccl", "NCCL_SOCKET_IFNAME"), ("cpu:gloo,cuda:nccl", "NCCL_SOCKET_IFNAME")],
)
def test_workers_that_do_not_find_one_another_are_told_what_to_look_at(monkeypatch, backend, variable):
    of_nccl = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",  # by default a lost worker would end this one by SIGABRT
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000",
    }
    for name in ("MASTER_ADDR", "MASTER_PORT", *of_nccl):
        monkeypatch.setenv(name, "")
    for name in of_nccl:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    said = f"rank 1 of 2 could not join the others over '{backend}' at 127.0.0.1:{port}: .*MASTER_PORT.*{variable}=INT"
    with pytest.raises(RuntimeError, match=said) as raised:
        join_group(backend, address="127.0.0.1", port=port, worker=1, workers=2, timeout=timedelta(seconds=0.1))
    assert raised.value.__cause__ is not None
    assert not group_exists()
    assert {name: os.environ[name] for name in of_nccl if name in os.environ} == (of_nccl if "nccl" in backend else {})


@pytest.fixture
def free_port(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # joining sets them
    with socket.create_server(("127.0.0.1", 0)) as other:
        return other.getsockname()[1]


def test_a_port_that_is_in_use_is_named(free_port):
    """By another run with the same MASTER_PORT, say; the error told of interfaces and firewalls."""
    said = f"port {free_port} of its host is in use.* Set MASTER_PORT to another"
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(HostsCannotMeet, match=said):
        join_group("gloo", address="127.0.0.1", port=free_port, worker=0, workers=2, timeout=timedelta(seconds=9))


def test_rank_0_does_not_wait_for_its_own_store_where_its_host_has_another_number(free_port, capfd):
    """As with MPI, which numbers hosts by their names: it asked for 10 s, and told of a store that does not answer."""
    began = time.monotonic()
    join_group("gloo", address="127.0.0.1", port=free_port, worker=0, workers=1, timeout=timedelta(seconds=9), node=1)
    dist.destroy_process_group()
    assert time.monotonic() - began < 5
    assert "gets no answer" not in capfd.readouterr().err


class Stuck:
    """A group whose abort does not return before those of others, as if its kernel waited for theirs."""

    def __init__(self, others):
        self.others, self.aborted = others, threading.Event()

    def abort(self):
        self.aborted.set()
        assert all(other.aborted.wait(5) for other in self.others)


def test_all_groups_are_aborted_at_once_and_not_one_after_the_other(monkeypatch):
    groups = []
    groups += [Stuck(groups), Stuck(groups), Stuck(groups)]
    monkeypatch.setattr("resist_lightning.comm.group.group_exists", lambda: True)
    monkeypatch.setattr("resist_lightning.comm.group.dist.get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr("resist_lightning.comm.group._world", SimpleNamespace(pg_map=dict.fromkeys(groups)))
    began = time.monotonic()
    interrupt_group()
    assert all(group.aborted.is_set() for group in groups)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("backends", "expected"),
    [("cuda:nccl", ["abort"]), ("cpu:gloo,cuda:nccl", ["cut", "abort"]), ("cpu:gloo,cuda:gloo", ["cut"])],
)
def test_each_backend_of_a_group_is_interrupted_by_its_own_means(monkeypatch, backends, expected):
    """A thread that waited in the gloo half of a mixed group waited on."""
    done = []
    group = SimpleNamespace(abort=lambda: done.append("abort"))
    monkeypatch.setattr("resist_lightning.comm.group.group_exists", lambda: True)
    monkeypatch.setattr("resist_lightning.comm.group.dist.get_backend_config", lambda: backends)
    monkeypatch.setattr("resist_lightning.comm.group._world", SimpleNamespace(pg_map=[group]))
    monkeypatch.setattr("resist_lightning.comm.group.cut_connections", lambda: done.append("cut"))
    interrupt_group()
    assert done == expected

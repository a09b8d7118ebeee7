"""Groups that cannot serve a worker's tensors are refused; joining and leaving is tested in ``tests/distributed``."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from resist_lightning.comm.group import check_backend, group_exists, interrupt_group, join_group, messages_sent


@pytest.mark.parametrize(
    ("backends", "device", "bound", "said"),
    [
        ({"cuda": "nccl"}, "cpu", None, r"module is on cpu.*group has 'cuda:nccl' only.*Move the module"),
        ({"cpu": "mpi"}, "cpu", None, r"on cpu by 'mpi'.*only 'gloo' and 'nccl'.*init_process_group\('gloo'\)"),
        ({"xpu": "xccl"}, "xpu:0", None, r"on xpu:0 by 'xccl'"),
        ({"cuda": "nccl"}, "cuda:1", None, r"module of rank 1 is on cuda:1.*current device.*cuda:0.*set_device\(1\)"),
        ({"cuda": "nccl"}, "cuda:1", "cuda:0", r"module of rank 1 is on cuda:1.*bound to cuda:0.*set_device\(1\)"),
    ],
)
def test_a_group_that_cannot_serve_the_module_is_refused(monkeypatch, backends, device, bound, said):
    group = SimpleNamespace(bound_device_id=torch.device(bound) if bound else None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr("resist_lightning.comm.group._get_default_group", lambda: group)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device(device)
    with pytest.raises(ValueError, match=said):
        check_backend(backends.get(device.type), device, backends)


def test_a_process_without_a_group_has_sent_nothing():
    assert not group_exists()
    assert messages_sent() == 0


@pytest.mark.parametrize(("backend", "variable"), [("gloo", "GLOO_SOCKET_IFNAME"), ("nccl", "NCCL_SOCKET_IFNAME")])
def test_workers_that_do_not_find_one_another_are_told_what_to_look_at(monkeypatch, backend, variable):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    said = f"rank 1 of 2 could not join the others over '{backend}' at 127.0.0.1:{port}: .*MASTER_PORT.*{variable}=INT"
    with pytest.raises(RuntimeError, match=said) as raised:
        join_group(backend, address="127.0.0.1", port=port, worker=1, workers=2, timeout=timedelta(seconds=0.1))
    assert raised.value.__cause__ is not None
    assert not group_exists()
    # By NCCL's default a lost worker would end this one by SIGABRT.
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == ("2" if backend == "nccl" else None)


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
    monkeypatch.setattr("resist_lightning.comm.group._uses_nccl", lambda: True)
    monkeypatch.setattr("resist_lightning.comm.group._world", SimpleNamespace(pg_map=dict.fromkeys(groups)))
    began = time.monotonic()
    interrupt_group()
    assert all(group.aborted.is_set() for group in groups)
    assert time.monotonic() - began < 4

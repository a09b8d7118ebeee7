"""Groups that cannot serve a worker's tensors are refused; joining and leaving is tested in ``tests/distributed``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from resist_lightning.comm.group import check_backend, group_exists, messages_sent


@pytest.mark.parametrize(
    ("backends", "device", "bound", "said"),
    [
        ({"cuda": "nccl"}, "cpu", None, r"module is on cpu.*group has 'cuda:nccl' only.*Move the module"),
        ({"cpu": "mpi"}, "cpu", None, r"on cpu by 'mpi'.*only 'gloo' and 'nccl'.*init_process_group\('gloo'\)"),
        ({"xpu": "xccl"}, "xpu:0", None, r"on xpu:0 by 'xccl'"),
        ({"cuda": "nccl"}, "cuda:1", "cuda:0", r"worker 1's module is on cuda:1.*bound to cuda:0.*set_device\(1\)"),
    ],
)
def test_a_group_that_cannot_serve_the_module_is_refused(monkeypatch, backends, device, bound, said):
    group = SimpleNamespace(bound_device_id=torch.device(bound) if bound else None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr("resist_lightning.comm.group._get_default_group", lambda: group)
    device = torch.device(device)
    with pytest.raises(ValueError, match=said):
        check_backend(backends.get(device.type), device, backends)


def test_a_process_without_a_group_has_sent_nothing():
    assert not group_exists()
    assert messages_sent() == 0

"""The backends of a group for each device; messages of a collective are tested in ``tests/distributed``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from resist_lightning.comm.torch_collective import GroupCollective


@pytest.mark.parametrize(
    ("config", "device", "bound", "wire"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:1", None, "cuda:1"),
        ("cuda:nccl2", "cuda:1", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", None, "cpu"),
        ("cpu:gloo,cuda:nccl", None, None, "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1", "cuda:1"),
        ("cuda:nccl", None, None, "cuda"),
        ("cpu:gloo,cuda:gloo", "cuda:1", None, "cpu"),
        ("cpu:gloo", "cuda:1", None, "cpu"),
    ],
)
def test_numbers_are_sent_where_the_backend_of_the_module_s_device_takes_them(monkeypatch, config, device, bound, wire):
    assert str(group_of(monkeypatch, config, device, bound)._device) == wire


def group_of(monkeypatch, config, device, bound):
    """A collective without a real group."""
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    given = torch.device(bound) if bound else None
    monkeypatch.setattr("resist_lightning.comm.torch_collective.bound_device", lambda: given)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return GroupCollective(torch.device(device) if device else None)

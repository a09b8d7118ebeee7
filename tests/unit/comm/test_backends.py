"""Backends that cannot serve a worker's tensors are refused, and only NCCL is bound to a GPU."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.comm.backends import binds, check_backend, nccl_variables, uses_nccl


@pytest.mark.parametrize(
    ("backends", "device", "bound", "said"),
    [
        ({"cuda": "nccl"}, "cpu", None, r"module is on cpu.*group has 'cuda:nccl' only.*Move the module"),
        ({"cpu": "mpi"}, "cpu", None, r"on cpu by 'mpi'.*only 'gloo' and 'nccl'.*init_process_group\('gloo'\)"),
        ({"xpu": "xccl"}, "xpu:0", None, r"on xpu:0 by 'xccl'"),
        ({"cuda": "nccl"}, "cuda:1", None, r"module of rank 1 is on cuda:1.*current device.*cuda:0.*set_device\(1\)"),
        (
            {"cuda": "gloo", "cpu": "gloo"},
            "cuda:1",
            None,
            r"on cuda:1.*device.*cuda:0.*set_device\(1\) before the module",
        ),
        ({"cuda": "nccl"}, "cuda:1", "cuda:0", r"module of rank 1 is on cuda:1.*bound to cuda:0.*set_device\(1\)"),
    ],
)
def test_a_group_that_cannot_serve_the_module_is_refused(monkeypatch, backends, device, bound, said):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device(device)
    with pytest.raises(ValueError, match=said):
        check_backend(backends.get(device.type), device, backends, 1, torch.device(bound) if bound else None)


@pytest.mark.parametrize(
    ("backend", "device", "bound"),
    [("nccl", "cuda:1", True), ("nccl2", "cuda:1", True), ("gloo", "cuda:1", False), ("gloo", "cpu", False)],
)
def test_only_nccl_is_bound_to_a_gpu(backend, device, bound):
    assert binds(backend, torch.device(device)) is bound


def test_variables_of_the_user_stay_and_the_one_that_torchrun_sets_does_not():
    handling = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    assert nccl_variables({}, by_torchrun=True)[handling] == nccl_variables({}, by_torchrun=False)[handling] == "2"
    # torchrun sets 1 for each worker, by which NCCL's watchdog ended the survivors by SIGABRT.
    assert nccl_variables({handling: "1"}, by_torchrun=True)[handling] == "2"
    assert handling not in nccl_variables({handling: "3"}, by_torchrun=True)
    assert handling not in nccl_variables({handling: "1"}, by_torchrun=False)


@pytest.mark.parametrize(
    ("backend", "is_so"),
    [
        ("nccl", True), ("nccl2", True), ("NCCL", True), ("cpu:gloo,cuda:nccl", True), ("cuda:nccl-lazy", True),
        ("gloo", False), ("cpu:gloo,cuda:gloo", False), ("ucc", False),
    ],
)  # fmt: skip
def test_nccl_is_seen_beside_another_backend(backend, is_so):
    # "cpu:gloo,cuda:nccl" passed for gloo: the variables were not set, and a lost worker ended the others by SIGABRT.
    assert uses_nccl(backend) is is_so

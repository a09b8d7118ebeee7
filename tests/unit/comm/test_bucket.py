"""Tensors that live in one buffer."""

from __future__ import annotations

import io

import torch
from torch import nn

from resist_lightning.comm.bucket import Bucket, make_buckets


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    return net.to(memory_format=torch.channels_last)


def test_tensors_keep_identity_values_and_memory_format_and_share_one_buffer():
    net = network()
    parameters = list(net.parameters())
    before = [(id(p), p.detach().clone(), p.stride()) for p in parameters]
    bucket = Bucket(parameters)
    assert [(id(p), p.stride()) for p in net.parameters()] == [(number, stride) for number, _, stride in before]
    for parameter, (_, value, _) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
    assert bucket.flat.numel() == sum(p.numel() for p in parameters)
    bucket.flat.mul_(2)
    assert all(torch.equal(p, 2 * value) for p, (_, value, _) in zip(parameters, before, strict=True))


def test_training_goes_on_in_the_buffer():
    moved, plain = network(), network()
    bucket = Bucket(list(moved.parameters()))
    for net in (moved, plain):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), plain.parameters(), strict=True))
    assert bucket.holds(list(moved.parameters()))


def test_a_bucket_knows_its_tensors():
    parameters = list(network().parameters())
    bucket = Bucket(parameters)
    assert bucket.holds(parameters)
    assert not bucket.holds(parameters[1:])
    assert not bucket.holds(parameters[::-1])
    assert not bucket.holds([*parameters[:-1], nn.Parameter(parameters[-1].detach())])
    parameters[1].data = parameters[1].detach().clone()
    assert not bucket.holds(parameters)


def test_afterwards_every_tensor_has_memory_of_its_own():
    net = network()
    bucket = Bucket(list(net.parameters()))
    values = [p.detach().clone() for p in net.parameters()]
    elsewhere = net[2].weight
    elsewhere.data = elsewhere.detach() + 1
    bucket.dissolve()
    storages = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert len(storages) == len(values)
    assert bucket.flat.untyped_storage().data_ptr() not in storages
    assert all(torch.equal(p, v) for p, v in zip(list(net.parameters())[:-1], values, strict=False))
    assert torch.equal(elsewhere, values[-1] + 1)
    saved = io.BytesIO()
    torch.save(net[1].state_dict(), saved)
    assert len(saved.getvalue()) < 4000


def test_there_is_a_bucket_for_each_data_type_unless_memory_has_gaps():
    floats, counter = [torch.ones(3), torch.ones(2, 2)], torch.tensor(5)
    gaps = torch.ones(4, dtype=torch.float64)[::2]
    buckets = make_buckets([floats[0], counter, floats[1], gaps], torch.device("cpu"))
    assert buckets.keys() == {torch.float32, torch.int64}
    assert buckets[torch.float32].holds(floats)
    assert counter.item() == 5
    assert gaps.stride() == (2,)


def test_tensors_that_share_memory_or_live_elsewhere_are_left_where_they_are():
    weight = nn.Parameter(torch.ones(3))
    tied = nn.Parameter(weight.detach())
    part = torch.ones(4)[:3]
    assert make_buckets([weight, tied], torch.device("cpu")) == {}
    assert make_buckets([torch.ones(3), part], torch.device("cpu")) == {}
    assert make_buckets([torch.ones(3)], torch.device("meta")) == {}
    with torch.no_grad():
        weight.add_(1)
    assert tied.tolist() == [2.0, 2.0, 2.0]

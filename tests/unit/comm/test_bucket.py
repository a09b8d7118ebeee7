"""Tensors that live in one buffer."""

from __future__ import annotations

import io

import torch
from torch import nn

from resist_lightning.comm.bucket import Bucket, make_buckets

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    return net.to(memory_format=torch.channels_last)


def test_tensors_keep_identity_values_and_memory_format_and_share_one_buffer():
    net = network()
    parameters = list(net.parameters())
    before = [(id(p), p.detach().clone(), p.stride()) for p in parameters]
    bucket = Bucket(parameters, CPU)
    assert [(id(p), p.stride()) for p in net.parameters()] == [(number, stride) for number, _, stride in before]
    for parameter, (_, value, _) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
    assert bucket.flat.numel() == sum(p.numel() for p in parameters)
    bucket.flat.mul_(2)
    assert all(torch.equal(p, 2 * value) for p, (_, value, _) in zip(parameters, before, strict=True))


def test_training_goes_on_in_the_buffer():
    moved, plain = network(), network()
    bucket = Bucket(list(moved.parameters()), CPU)
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
    bucket = Bucket(parameters, CPU)
    assert bucket.holds(parameters)
    assert not bucket.holds(parameters[1:])
    assert not bucket.holds(parameters[::-1])
    assert not bucket.holds([*parameters[:-1], nn.Parameter(parameters[-1].detach())])


def test_tensors_are_aligned_as_their_sizes_allow_without_padding():
    """A gain of one number, as in ReZero and NFNets, or ten classes shifted all weights after it by 4 bytes."""
    sizes = [1, 64, 10, 128, 3, 4, 20]
    tensors = [torch.full((size,), float(size)) for size in sizes]
    bucket = Bucket(tensors, CPU)
    assert bucket.flat.numel() == sum(sizes)
    start = bucket.flat.data_ptr()
    for size, alignment in ((128, 256), (64, 256), (4, 16), (20, 16), (10, 8), (3, 4), (1, 4)):
        assert (tensors[sizes.index(size)].data_ptr() - start) % alignment == 0
    assert all(torch.equal(t, torch.full((size,), float(size))) for size, t in zip(sizes, tensors, strict=True))


def test_a_tensor_that_has_left_is_copied_in_and_out():
    parameters = list(network().parameters())
    bucket = Bucket(parameters, CPU)
    left = parameters[1]
    left.data = left.detach().clone() + 1
    expected = [p.detach().clone() * 2 for p in parameters]
    bucket.collect()
    bucket.flat.mul_(2)
    bucket.spread()
    assert all(torch.equal(p, value) for p, value in zip(parameters, expected, strict=True))
    assert left.untyped_storage().data_ptr() != bucket.flat.untyped_storage().data_ptr()


def test_afterwards_every_tensor_has_memory_of_its_own():
    net = network()
    bucket = Bucket(list(net.parameters()), CPU)
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


def test_only_what_cannot_live_in_the_buffer_is_copied():
    """An LSTM's weights share one memory on GPUs, for cuDNN, which kept all of their data type out of the buffer."""
    flattened = torch.arange(6.0)
    weights = [nn.Parameter(flattened[:4].view(2, 2)), nn.Parameter(flattened[4:])]
    tied = nn.Parameter(torch.ones(3))
    also_tied = nn.Parameter(tied.detach())
    gaps, plain, counter = torch.arange(8.0)[::2], torch.ones(64), torch.tensor(5)
    outside = [*weights, tied, also_tied, gaps]
    buckets = make_buckets([*outside, counter, plain], CPU)
    assert buckets.keys() == {torch.float32, torch.int64}
    bucket = buckets[torch.float32]
    assert bucket.holds([*outside, plain])
    assert plain.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() != bucket.flat.untyped_storage().data_ptr() for t in outside)

    bucket.collect()
    bucket.flat.add_(1)
    bucket.spread()

    assert flattened.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert tied.tolist() == also_tied.tolist() == [2.0, 2.0, 2.0]
    assert gaps.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert gaps.stride() == (2,)
    assert plain.tolist() == [2.0] * 64
    bucket.dissolve()
    assert plain.untyped_storage().nbytes() == plain.nbytes

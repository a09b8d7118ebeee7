"""What comes of a mean in fewer bits: what was there before, and the mean of the changes as they were sent."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from resist_lightning.comm import quantize
from resist_lightning.comm.byte_formulas import WIRE_FORMATS
from resist_lightning.comm.compressed_mean import CompressedMean
from resist_lightning.comm.quantize import make_quantizer
from tests.helpers.threads import run_threads

SHAPES = ((40, 33), (1,), (0, 3), (700,), (2, 3, 5, 7))
ENTRIES = 40 * 33 + 1 + 700 + 210


def start():
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=noise) for shape in SHAPES]
    # One whose entries do not lie in their order in memory.
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    return tensors


def in_order(tensors):
    """In the order of a message: matrices, then vectors."""
    return [tensor for tensor in tensors if tensor.dim() > 1] + [tensor for tensor in tensors if tensor.dim() < 2]


def trained(worker):
    tensors = start()
    noise = torch.Generator().manual_seed(9 + worker)
    for tensor in tensors:
        tensor.add_((worker + 1) * 1e-3 * torch.randn(tensor.shape, generator=noise))
    return tensors


def change_of(worker):
    """Flat, in the order of a message."""
    pairs = zip(in_order(trained(worker)), in_order(start()), strict=True)
    return torch.cat([(now - then).flatten() for now, then in pairs])


def add(tensors, change):
    first = 0
    for tensor in in_order(tensors):
        tensor.add_(change[first : first + tensor.numel()].view(tensor.shape))
        first += tensor.numel()


def averaged(collective, name, left_out):
    tensors = start()
    mean = CompressedMean(collective, make_quantizer(name))
    mean.begin(tensors)
    for tensor, value in zip(tensors, trained(collective.worker), strict=True):
        tensor.copy_(value)
    mean.average(tensors, "shared", left_out)
    return [tensor.contiguous() for tensor in tensors], Counter(collective.sent_bytes)


@pytest.mark.parametrize("pieces", [False, True], ids=["one piece", "pieces"])
@pytest.mark.parametrize(("name", "left_out"), [("bf16", ()), ("int8", ()), ("int6", (1,)), ("int4", ())])
def test_all_end_with_the_same_which_is_the_mean_of_what_was_sent(monkeypatch, name, left_out, pieces):
    wire = make_quantizer(name)
    sent = [wire.through(change_of(worker)) for worker in range(3) if worker not in left_out]
    mean = wire.through(sum(sent[1:], sent[0]) / len(sent))
    expected = start()
    add(expected, mean)
    if pieces:
        monkeypatch.setattr(quantize, "_PIECE_ENTRIES", 512)

    told, _ = run_threads(averaged, 3, name, left_out)

    for worker, (tensors, sent_bytes) in enumerate(told):
        assert all(torch.equal(own, other) for own, other in zip(tensors, expected, strict=True))
        assert sent_bytes == {"shared": WIRE_FORMATS[name].mean_bytes(ENTRIES, worker, 3)}


def test_a_second_round_remembers_in_the_memory_of_the_first_and_counts_from_its_beginning():
    def two_rounds(collective):
        tensors = start()
        mean = CompressedMean(collective, make_quantizer("bf16"))
        places = []
        for _ in range(2):
            mean.begin(tensors)
            places.append([mean.before(tensor).data_ptr() for tensor in tensors])
            for tensor in tensors:
                tensor.add_(0.25)
            mean.average(tensors, "shared")
        tensors[0] += 1
        frozen = mean.before(tensors[0]).clone()
        mean.begin(tensors[1:])
        return tensors, places, frozen, mean.known(tensors[0])

    told, _ = run_threads(two_rounds, 2)
    for tensors, places, before_the_last, still_known in told:
        assert places[0] == places[1]
        assert not still_known
        tensors[0] -= 1
        for now, then in zip(tensors, start(), strict=True):
            torch.testing.assert_close(now, then + 0.5)
        torch.testing.assert_close(before_the_last, start()[0] + 0.25)

"""A mean in fewer bits is the value before the round plus the mean of the changes as sent."""

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
MATRICES = 40 * 33 + 210
ENTRIES = MATRICES + 1 + 700


def start():
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=noise) for shape in SHAPES]
    # A tensor whose entries are not in memory order.
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    return tensors


def in_order(tensors):
    """Tensors in the order of a message: matrices, then vectors."""
    return [tensor for tensor in tensors if tensor.dim() > 1] + [tensor for tensor in tensors if tensor.dim() < 2]


def trained(worker):
    tensors = start()
    noise = torch.Generator().manual_seed(9 + worker)
    for tensor in tensors:
        tensor.add_((worker + 1) * 1e-3 * torch.randn(tensor.shape, generator=noise))
    return tensors


def change_of(worker):
    """A worker's change, flat, in the order of a message."""
    pairs = zip(in_order(trained(worker)), in_order(start()), strict=True)
    return torch.cat([(now - then).flatten() for now, then in pairs])


def add(tensors, change):
    first = 0
    for tensor in in_order(tensors):
        tensor.add_(change[first : first + tensor.numel()].view(tensor.shape))
        first += tensor.numel()


def without_entries(collective):
    tensor = torch.empty(0, 3)
    mean = CompressedMean(collective, make_quantizer("int2"))
    mean.begin([tensor])
    mean.average([tensor], "shared")
    return collective.sent_bytes


def test_a_message_of_empty_tensors_is_not_sent():
    """A network whose only shared matrix is empty ended with an error of `zip`."""
    results, _ = run_threads(without_entries, 2)
    assert [sum(sent.values()) for sent in results] == [0, 0]


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
        assert sent_bytes == {"shared": WIRE_FORMATS[name].mean_bytes(MATRICES, ENTRIES - MATRICES, worker, 3)}


def of_given(collective, name, before, after):
    tensors = [tensor.clone() for tensor in before]
    mean = CompressedMean(collective, make_quantizer(name))
    mean.begin(tensors)
    for tensor, value in zip(tensors, after[collective.worker], strict=True):
        tensor.copy_(value)
    mean.average(tensors, "shared")
    return tensors


@pytest.mark.parametrize("name", ["int8", "int2"])
def test_the_default_data_type_which_a_step_may_set_meanwhile_changes_nothing(name):
    """With precision="64-true", overlap and wire, workers ended with other weights, by when their steps ran."""
    before, after = start(), [trained(worker) for worker in range(2)]
    (expected, _), _ = run_threads(of_given, 2, name, before, after)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            (found, _), _ = run_threads(of_given, 2, name, before, after)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


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


def rounds_of(collective, rounds, left_out, resume_at):
    """Make the same change in each round; returns the tensors, and the first one's rounding remainder at the end."""
    tensors = start()
    means = [CompressedMean(collective, make_quantizer("int2")) for _ in range(2)]
    mean = means[0]
    for round in range(rounds):
        if round == resume_at:
            named = dict(enumerate(tensors))
            means[1].load_state_dict(mean.state_dict(named), named)
            mean = means[1]
        mean.begin(tensors)
        for tensor, goal, origin in zip(tensors, trained(collective.worker), start(), strict=True):
            tensor.add_(goal - origin)
        mean.average(tensors, "shared", left_out if round == 2 else ())
    return [tensor.contiguous() for tensor in tensors], mean.taken(tensors[0])


def test_what_rounding_takes_comes_with_later_means():
    """After many rounds of the same changes all have arrived, but for the remainders of the last rounds."""
    rounds, workers = 60, 3
    change = sum(change_of(worker) for worker in range(workers)) / workers
    told, _ = run_threads(rounds_of, workers, rounds, (), None)
    found = torch.cat(
        [(now - then).flatten() for now, then in zip(in_order(told[0][0]), in_order(start()), strict=True)]
    )
    once = make_quantizer("int2").through(change)
    missing, missing_without = found / rounds - change, once - change
    assert missing.abs().mean() < 0.1 * missing_without.abs().mean()
    for tensors, _ in told:
        assert all(torch.equal(own, other) for own, other in zip(tensors, told[0][0], strict=True))


@pytest.mark.parametrize("left_out", [(), (1,)])
def test_two_bits_by_hand_and_resumed(left_out):
    """Matrices in two bits, with earlier rounding remainders; vectors exactly, added up in the workers' order."""
    wire, workers, rounds = make_quantizer("int2"), 3, 5
    form = wire.format
    tensors, taken = start(), [torch.zeros(MATRICES) for _ in range(workers)]
    for round in range(rounds):
        out = left_out if round == 2 else ()
        sent, exact = [], []
        for worker in range(workers):
            if worker in out:
                sent.append(torch.zeros(MATRICES))
                exact.append(torch.zeros(ENTRIES - MATRICES))
                continue
            # The difference of two sums, as a worker computes it.
            moved = [t + (goal - origin) - t for t, goal, origin in zip(tensors, trained(worker), start(), strict=True)]
            change = torch.cat([t.flatten() for t in in_order(moved)])
            exact.append(change[MATRICES:])
            wanted = change[:MATRICES] + taken[worker]
            sent.append(wire.through(wanted))
            taken[worker] = wanted - sent[worker]
        mean = torch.empty(MATRICES)
        for worker in range(workers):
            first, last = (form.group * group for group in form.share(MATRICES, worker, workers))
            part = sent[0][first:last]
            for other in sent[1:]:
                part = part + other[first:last]
            part = (part + taken[worker][first:last]) / (workers - len(out))
            mean[first:last] = wire.through(part)
            taken[worker][first:last] = (part - mean[first:last]) * workers
        mean_of_vectors = (exact[0] + exact[1] + exact[2]) / (workers - len(out))
        add(tensors, torch.cat([mean, mean_of_vectors]))

    for resume_at in (None, 3):
        told, _ = run_threads(rounds_of, workers, rounds, left_out, resume_at)
        for worker, (found, owed) in enumerate(told):
            assert all(torch.equal(own, other) for own, other in zip(found, tensors, strict=True))
            assert torch.equal(owed, taken[worker][: len(owed)])

"""The strict collective refuses, mixes up and hangs where NCCL would, and says so at once."""

from __future__ import annotations

import time

import pytest
import torch

from tests.helpers.strict_collective import Deadlock, RuleBroken, run_strictly


def test_operations_give_what_they_give_elsewhere():
    def work(collective):
        me = collective.worker
        total, flags, first = torch.tensor([1.0 + me]), torch.tensor([me == 2]), torch.tensor([5 + me])
        finish = collective.start_all_reduce(total, "shared")
        flags = collective.start_all_reduce(flags, "shared")().tolist()
        collective.broadcast_(first, "start")
        left, right = (me - 1) % 3, (me + 1) % 3
        found = [torch.zeros(2), torch.zeros(1)]
        sends = {right: [torch.full((2,), 1.0 * me), torch.full((1,), 2.0 * me)]}
        collective.exchange(sends, {left: found}, {"merge": 12})
        assert [flat[0].item() for flat in found] == [left, 2.0 * left]
        collective.connect()
        assert collective.gather_numbers([me]) == [[0], [1], [2]]
        assert collective.gather_bytes(b"a" * me) == [b"", b"a", b"aa"]
        return finish().item(), flags, first.item(), dict(collective.sent_bytes)

    values, _ = run_strictly(work, 3)
    start = {0: 2 + 16, 1: 2, 2: 2}
    for worker, (total, flags, first, sent) in enumerate(values):
        assert (total, flags, first) == (6.0, [True], 5)
        assert sent == {"shared": 6 + 2, "merge": 12, "start": start[worker], "control": 16 + 16 + 4}


def test_a_tensor_elsewhere_with_gaps_or_of_an_unknown_type_is_refused():
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(4)[::2], torch.zeros(2, dtype=torch.int16)):
        with pytest.raises(RuleBroken, match=r"expected a tensor on cpu|cannot be sent"):
            run_strictly(lambda collective, tensor=tensor: collective.broadcast_(tensor, "start"), 2)


def test_receives_that_are_posted_early_block_the_sends_behind_them():
    """gloo allows it, and AuxNet needs it, so AuxNet refuses NCCL."""

    def early(collective):
        other = 1 - collective.worker
        receive = collective.start_receive(torch.zeros(1), other, tag=1)
        send = collective.start_send(torch.ones(1), other, tag=1, kind="boundary")
        receive()
        send()

    with pytest.raises(Deadlock, match=r"worker 0 waits in receive from 1 .*; worker 1 waits in receive from 0"):
        run_strictly(early, 2)


def test_tags_are_ignored():
    def crossed(collective):
        flats = [torch.zeros(1), torch.zeros(1)]
        if collective.worker == 0:
            sends = [collective.start_send(torch.tensor([float(tag)]), 1, tag=tag, kind="output") for tag in (7, 8)]
            return [finish() for finish in sends]
        receives = [collective.start_receive(flat, 0, tag=tag) for flat, tag in zip(flats, (8, 7), strict=True)]
        for finish in receives:
            finish()
        return [flat.item() for flat in flats]

    assert run_strictly(crossed, 2)[0][1] == [7.0, 8.0]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((2, 3), r"mix up their operations: all_reduce \['float32\[2\].*\[3\]"), ((2, 0), r"worker 1 has ended")],
)
def test_workers_that_say_different_things_are_told_so(sizes, said):
    def reduce(collective):
        size = sizes[collective.worker]
        if size:
            collective.start_all_reduce(torch.ones(size), "shared")()

    with pytest.raises(RuleBroken, match=said):
        run_strictly(reduce, 2)


def test_memory_under_way_must_be_left_alone():
    def write(collective):
        flat = torch.ones(2)
        finish = collective.start_all_reduce(flat, "shared")
        if collective.worker == 1:
            time.sleep(0.05)
            flat.add_(1)
        finish()

    with pytest.raises(RuleBroken, match="worker 1 wrote into"):
        run_strictly(write, 2)


def test_the_error_of_a_worker_is_raised_and_ends_the_others():
    def fail(collective):
        if collective.worker == 1:
            raise ValueError("a mistake")
        collective.gather_numbers([1.0])

    with pytest.raises(ValueError, match="a mistake"):
        run_strictly(fail, 2)

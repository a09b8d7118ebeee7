"""The plan, executed on tensors: any partitions, several data types, one flat buffer per pair and data type."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import settings as examples

from resist_lightning.comm import packing
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.payload import Payload
from resist_lightning.schedule.partition import draw_partition, everything
from resist_lightning.schedule.transfers import plan_assembly, plan_sync
from tests.helpers.partitions import two_partitions
from tests.helpers.strict_collective import run_strictly
from tests.helpers.threads import run_threads

CPU = torch.device("cpu")
SHAPES = ((2, 3), (4,), ())


def trained(worker, block):
    """A worker's tensors of a block: three float32, a float64, an int64 and a bool; exact in any mean of up to 6."""
    number = 60.0 * (worker + 1) + 7 * block
    floats = [torch.full(shape, number + index) for index, shape in enumerate(SHAPES)]
    return [
        floats[0],
        torch.full((3,), number, dtype=torch.float64),
        torch.tensor(worker * 10 + block),
        floats[1],
        torch.tensor([worker == 1, False]),
        floats[2],
    ]


def state_of(worker, block):
    return [torch.full((2, 3), 1000.0 * worker + block)]


def empty_like(tensors):
    return [torch.empty_like(tensor, device="meta") for tensor in tensors]


def sync_one(collective, before, after, with_state):
    """A worker's part in a sync from ``before`` to ``after``; returns its tensors of each block that it then holds."""
    me = collective.worker
    plan = plan_sync(before, after)
    has = {block: trained(me, block) for block in before.held[me]}
    states = {block: state_of(me, block) for block in before.held[me]}

    def payload(block):
        here = block in has
        load = has[block] if here else empty_like(trained(0, block))
        state = (states[block] if here else empty_like(state_of(0, block))) if with_state else ()
        return Payload(load, state)

    def make_room():
        for block in set(has) - set(after.held[me]):
            del has[block], states[block]
        for block in set(after.held[me]) - set(has):
            has[block] = [torch.zeros_like(tensor) for tensor in trained(0, block)]
            states[block] = [torch.zeros_like(tensor) for tensor in state_of(0, block)]

    exchange = Exchange(collective, CPU)
    if plan.averaged:
        exchange.average([t for block in plan.averaged for t in has[block]], "shared")
    exchange.merge(plan, payload)
    exchange.hand_over(plan, payload, make_room)
    return has, states, plan.averaged, dict(collective.sent_bytes)


def mean_of(copies):
    stacked = torch.stack(copies)
    return stacked.double().mean(0) if stacked.is_floating_point() else stacked.max(0).values


@examples(max_examples=25)
@given(two_partitions())
def test_every_next_holder_has_the_mean_over_the_last_holders_and_integers_the_maximum(partitions):
    before, after = partitions
    results, _ = run_strictly(sync_one, before.workers, before, after, True)
    for worker, (has, states, averaged, _) in enumerate(results):
        assert set(has) == set(after.held[worker])
        for block, tensors in has.items():
            old = before.holders(block)
            for number, tensor in enumerate(tensors):
                expected = mean_of([trained(holder, block)[number] for holder in old])
                torch.testing.assert_close(tensor, expected.to(tensor.dtype))
                if len(old) == 1:
                    assert torch.equal(tensor, trained(old[0], block)[number])
            if block not in averaged:
                torch.testing.assert_close(
                    states[block][0], mean_of([state_of(holder, block)[0] for holder in old]).float()
                )


@examples(max_examples=25)
@given(two_partitions())
def test_bytes_are_counted_where_they_are_sent_and_by_kind(partitions):
    before, after = partitions
    results, _ = run_threads(sync_one, before.workers, before, after, True)
    block_bytes = 4 * (6 + 4 + 1) + 8 * 3 + 8 + 2
    state_bytes = 4 * 6
    total = Counter()
    for *_, sent in results:
        total.update(sent)
    merges = spreads = 0
    for block in range(before.blocks):
        old, new = set(before.holders(block)), set(after.holders(block))
        if not len(old) == len(new) == before.workers > 1:
            merges += len(old) - 1
            spreads += len(new) - bool(old & new)
    assert total["merge"] == merges * block_bytes
    assert total["hand_over"] == spreads * block_bytes
    assert total["state"] == (merges + spreads) * state_bytes


class Listening(SoloCollective):
    """Worker 0 of three; remembers the messages that it should send or receive."""

    def __init__(self):
        super().__init__()
        self.workers = 3
        self.asked = []

    def start_all_reduce(self, flat, kind):
        self.asked.append(("all_reduce", flat.dtype, flat.numel(), kind))
        return lambda: flat

    def broadcast_(self, flat, kind):
        self.asked.append(("broadcast", flat.dtype, flat.numel(), kind))

    def exchange(self, sends, receives, kinds):
        for verb, side in (("send", sends), ("receive", receives)):
            for peer, flats in side.items():
                self.asked.append((verb, peer, [(flat.dtype, flat.numel(), flat.dim()) for flat in flats]))
        self.asked.append(("kinds", dict(kinds)))


def test_one_flat_buffer_per_pair_and_data_type_however_many_tensors():
    before, after = everything(6, 3), draw_partition(6, 3, 0, 0, 0)
    listening = Listening()
    plan = plan_sync(before, after)
    Exchange(listening, CPU).merge(plan, lambda block: Payload(trained(0, block)))
    messages = [entry for entry in listening.asked if entry[0] in ("send", "receive")]
    pairs = {(t.source, t.target) for t in plan.merge if 0 in (t.source, t.target)}
    assert len(messages) == len(pairs) == 4
    for _, peer, flats in messages:
        blocks = 2  # each worker owns two of six
        assert peer in (1, 2)
        assert flats == [
            (torch.bool, 2 * blocks, 1),
            (torch.float32, 11 * blocks, 1),
            (torch.float64, 3 * blocks, 1),
            (torch.int64, 1 * blocks, 1),
        ]


def test_what_all_others_get_is_packed_once():
    class Keeping(Listening):
        def exchange(self, sends, receives, kinds):
            self.sends = sends

    keeping = Keeping()
    plan = plan_assembly(plan_sync(draw_partition(6, 3, 0, 0, 0), draw_partition(6, 3, 0, 0, 1)), 0, 3)
    Exchange(keeping, CPU).hand_over(plan, lambda block: Payload(trained(0, block)), lambda: None)
    assert sorted(keeping.sends) == [1, 2]
    assert all(one is other for one, other in zip(keeping.sends[1], keeping.sends[2], strict=True))


def test_a_large_model_is_broadcast_in_parts(monkeypatch):
    monkeypatch.setattr(packing, "_PART_BYTES", 4 * 10)
    listening, tensors = Listening(), [torch.ones(2, 3), torch.ones(4), torch.ones(12), torch.ones(1)]
    Exchange(listening, CPU).broadcast(tensors, "start")
    assert [entries for _, _, entries, _ in listening.asked] == [10, 12, 1]


def test_an_average_and_a_broadcast_take_one_call_per_data_type():
    tensors = [torch.ones(2, 3), torch.tensor(5), torch.ones(4, dtype=torch.float64), torch.ones(7)]
    listening = Listening()
    exchange = Exchange(listening, CPU)
    exchange.average(tensors, "shared")
    exchange.broadcast(tensors, "start")
    for verb, kind in (("all_reduce", "shared"), ("broadcast", "start")):
        assert [entry for entry in listening.asked if entry[0] == verb] == [
            (verb, torch.float32, 13, kind),
            (verb, torch.float64, 4, kind),
            (verb, torch.int64, 1, kind),
        ]


def average_twice(collective):
    mine = [torch.full((2, 2), float(collective.worker)), torch.tensor(collective.worker), torch.zeros(0)]
    strided = torch.arange(6.0).reshape(2, 3).t() * (collective.worker + 1)
    Exchange(collective, CPU).average([*mine, strided], "shared")
    return [*mine, strided]


def test_averages_go_back_into_place_whatever_the_strides():
    results, _ = run_threads(average_twice, 3)
    for mine, number, nothing, strided in results:
        assert torch.equal(mine, torch.ones(2, 2))
        assert int(number) == 2
        assert nothing.numel() == 0
        assert torch.equal(strided, 2 * torch.arange(6.0).reshape(2, 3).t())
        assert strided.stride() == (1, 3)


def average_in_a_buffer(collective):
    memory = torch.full((6,), float(collective.worker))
    tensors = [memory[:2].view(2, 1), memory[2:], torch.full((3,), 10.0 * collective.worker)]
    exchange = Exchange(collective, CPU)
    exchange.put_together(tensors)
    exchange.average(tensors, "shared")
    exchange.take_apart()
    return memory.tolist(), tensors[2].tolist(), collective.room.log


def test_tensors_that_share_their_memory_are_averaged_with_those_in_the_buffer():
    for memory, alone, said in run_threads(average_in_a_buffer, 3)[0]:
        assert (memory, alone) == ([1.0] * 6, [10.0] * 3)
        assert len(said) == 3  # one all-reduce per worker


def merge_equal(collective):
    """Merge a block that is equal on all three holders, whose mean must not be rounded."""
    tensor = torch.tensor([0.1, 1e-30, 3.3333333, -7e20])
    before, after = everything(1, 3), draw_partition(1, 3, 0, 0, 0)
    has = {0: [tensor.clone()]}
    exchange = Exchange(collective, CPU)
    plan = plan_sync(before, after)
    exchange.merge(plan, lambda block: Payload(has[block]))
    exchange.hand_over(plan, lambda block: Payload(has[block]), lambda: None)
    return torch.equal(has[0][0], tensor)


def test_what_is_equal_on_all_holders_is_not_rounded_by_a_merge():
    assert run_threads(merge_equal, 3)[0] == [True, True, True]


def test_alone_nothing_is_sent():
    solo = SoloCollective()
    tensors = [torch.ones(3)]
    exchange = Exchange(solo, CPU)
    exchange.average(tensors, "shared")
    exchange.broadcast(tensors, "start")
    plan = plan_sync(everything(2, 1), everything(2, 1))
    exchange.merge(plan, lambda _: Payload(tensors))
    exchange.hand_over(plan, lambda _: Payload(tensors), lambda: None)
    assert sum(solo.sent_bytes.values()) == 0
    assert solo.gather_numbers([1.0, 2.0]) == [[1.0, 2.0]]
    assert torch.equal(tensors[0], torch.ones(3))


def test_all_bytes_may_be_counted_under_one_kind():
    listening = Listening()
    plan = plan_assembly(plan_sync(everything(6, 3), draw_partition(6, 3, 0, 0, 0)), 0, 3)
    exchange = Exchange(listening, CPU)
    payload = Payload(trained(0, 0), state_of(0, 0))
    exchange.merge(plan, lambda _: payload, "checkpoint")
    exchange.hand_over(plan, lambda _: payload, lambda: None, "checkpoint")
    assert [set(entry[1]) for entry in listening.asked if entry[0] == "kinds"] == [{"checkpoint"}, {"checkpoint"}]


def test_payload_travels_in_a_fixed_order_state_last():
    payload = Payload(trained(0, 1), state_of(0, 1))
    assert [tuple(t.shape) for t in payload.tensors] == [(2, 3), (3,), (), (4,), (2,), (), (2, 3)]

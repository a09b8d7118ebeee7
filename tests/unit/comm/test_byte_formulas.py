"""Bytes in closed form: section 5 of the design, with our networks and plans."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning import Config
from resist_lightning.comm.byte_formulas import (
    KINDS,
    SYNC_KINDS,
    WIRE_FORMATS,
    all_reduce_bytes,
    ddp_bytes,
    local_sgd_bytes,
)
from resist_lightning.methods.resist.bytes import Sizes, sync_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.models import preact_resnet
from resist_lightning.schedule.partition import draw_partition, everything
from resist_lightning.schedule.transfers import plan_outer, plan_sync
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.partitions import two_partitions

MB = 10**6


def paper_network(num_classes):
    """The network of Table 1, without memory; without running statistics, so that its bytes are its parameters'."""
    with torch.device("meta"):
        return preact_resnet(101, num_classes=num_classes, track_running_stats=False)


def parameter_bytes(module):
    return sum(4 * parameter.numel() for parameter in module.parameters())


def test_ddp_sends_in_every_step():
    assert ddp_bytes(10, 4, 7) == 7 * 15


@pytest.mark.parametrize(
    ("workers", "ten_classes", "hundred_classes"), [(2, 165.4, 165.6), (4, 248.1, 248.4), (8, 289.5, 289.8)]
)
def test_an_all_reduce_of_everything_is_what_ddp_sends_per_step(workers, ten_classes, hundred_classes):
    """Section 5's table prints the figures of 100 classes (P + Q = 165.6 MB), though it says 10."""
    for classes, megabytes in ((10, ten_classes), (100, hundred_classes)):
        full = parameter_bytes(paper_network(classes))
        exact = Fraction(2 * (workers - 1), workers) * full
        assert ddp_bytes(full, workers, 1) == local_sgd_bytes(full, workers, 1) == exact
        assert ddp_bytes(full, workers, 50) == local_sgd_bytes(full, workers, 50) == 50 * exact
        assert round(float(exact) / MB, 1) == megabytes


@pytest.mark.parametrize(("payload", "workers", "sent"), [(100, 1, 0), (100, 2, 100), (100, 4, 150), (10, 3, 14)])
def test_an_all_reduce_sends_twice_the_others_share_rounded_up(payload, workers, sent):
    assert all_reduce_bytes(payload, workers) == sent


def mean_bytes_per_worker(workers, min_blocks, rounds=1500):
    """Mean over real plans of the bytes that a worker sends, for the paper's network with 100 classes."""
    layout = BlockLayout(paper_network(100), Config(min_blocks=min_blocks), workers)
    sizes = layout.sizes(OptimizerStates([]))
    assert sizes.blocks == (4 * 1_180_672,) * 22
    assert sizes.shared == {"torch.float32": 4 * 15_422_116}
    partitions = [layout.schedule.partition(round) for round in range(rounds + 1)]
    plans = [plan_sync(old, new) for old, new in pairwise(partitions)]
    sent = [sum(kinds[k] for k in SYNC_KINDS) for plan in plans for kinds in sync_bytes(plan, sizes, workers)]
    return sum(sent) / len(sent)


@pytest.mark.parametrize(
    ("workers", "counts", "megabytes"),
    [(2, (11, 11), 87.7), (4, (6, 6, 5, 5), 112.0), (8, (3, 3, 3, 3, 3, 3, 2, 2), 119.3)],
)
def test_a_round_without_overlap_sends_what_section_5_promises(workers, counts, megabytes):
    """The table is for rounds without overlap, min_blocks <= 22 // S: for S = 8 that is at most 2, not the default 5.

    A block stays with its worker with chance sum(n_k^2) / L^2: 1/S where the counts n_k are equal.
    """
    moves = 22 - sum(Fraction(count**2, 22) for count in counts)
    expected = float(Fraction(2 * (workers - 1), workers) * 4 * 15_422_116 + moves * 4 * 1_180_672 / workers)
    assert round(expected / MB, 1) == megabytes
    assert mean_bytes_per_worker(workers, 22 // workers) == pytest.approx(expected, rel=0.005)


def test_eight_workers_with_the_default_minimum_overlap_and_send_more():
    assert mean_bytes_per_worker(8, 5, rounds=200) > 125 * MB


@given(two_partitions(), st.integers(1, 10**6), st.integers(1, 10**5), st.integers(0, 10**5))
def test_all_workers_together_send_the_closed_form(partitions, shared, block, state):
    """Section 5: 2 (S - 1) Q; b (holders before - 1) to merge; b (new holders without the merged value) to spread."""
    before, after = partitions
    workers, blocks = before.workers, before.blocks
    sizes = Sizes({"f": shared}, (block,) * blocks, ({"f": block},) * blocks, (state,) * blocks)
    rows = sync_bytes(plan_sync(before, after), sizes, workers)

    reduced, merged, spread = shared, 0, 0
    for index in range(blocks):
        old, new = set(before.holders(index)), set(after.holders(index))
        if workers > 1 and len(old) == len(new) == workers:
            reduced += block
        else:
            merged += len(old) - 1
            spread += len(new) - bool(old & new)
    assert len(rows) == workers
    for row in rows:
        assert set(row) == set(SYNC_KINDS) <= set(KINDS)
        assert row["shared"] == -((-2 * (workers - 1) * reduced) // workers)
    assert sum(row["merge"] for row in rows) == block * merged
    assert sum(row["hand_over"] for row in rows) == block * spread
    assert sum(row["state"] for row in rows) == state * (merged + spread)


def test_each_worker_pays_for_what_it_sends_itself():
    before, after = draw_partition(4, 2, 0, 0, 0), draw_partition(4, 2, 0, 0, 1)
    sizes = Sizes({"a": 1000, "b": 10}, (1, 10, 100, 1000), ({},) * 4, (2, 20, 200, 2000))
    rows = sync_bytes(plan_sync(before, after), sizes, 2)
    for worker, row in enumerate(rows):
        leaving = set(before.held[worker]) - set(after.held[worker])
        assert row == {
            "shared": 1010,
            "merge": 0,
            "hand_over": sum(10**block for block in leaving),
            "state": sum(2 * 10**block for block in leaving),
            "outer": 0,
        }
    assert sum(row["hand_over"] for row in rows) > 0


@given(two_partitions(), st.integers(0, 2**31), st.integers(1, 10**5))
def test_a_velocity_goes_to_those_who_take_the_next_outer_step(partitions, seed, velocity):
    """To the next owner, or to all workers if the block is averaged; to no worker that has it already."""
    before, after = partitions
    workers, blocks = before.workers, before.blocks
    later = draw_partition(blocks, workers, 0, seed, 0)
    plan, following = plan_sync(before, after), plan_sync(after, later)
    sizes = Sizes({}, (5,) * blocks, ({},) * blocks, (0,) * blocks, outer=(velocity,) * blocks)
    sent = Counter()
    for block in range(blocks):
        old, new, last = (set(partition.holders(block)) for partition in (before, after, later))
        if len(old) == len(new) == workers > 1:
            continue  # all have taken the same step
        everywhere = len(new) == len(last) == workers > 1
        if everywhere or following.owner[block] != plan.owner[block]:
            sent[plan.owner[block]] += velocity * (workers - 1 if everywhere else 1)
    rows = sync_bytes(plan, sizes, workers, following)
    assert [row["outer"] for row in rows] == [sent[worker] for worker in range(workers)]
    # Beside the block, so it costs no message.
    assert set(plan_outer(plan, following, workers)) <= set(plan.hand_over)


def test_without_the_next_plan_the_bytes_of_velocities_are_not_known():
    plan = plan_sync(everything(1, 2), everything(1, 2))
    with pytest.raises(ValueError, match="give it as `following`"):
        sync_bytes(plan, Sizes({}, (1,), ({},), (0,), outer=(1,)), 2)


def test_data_types_are_reduced_apart_so_each_is_rounded_up_by_itself():
    plan = plan_sync(everything(1, 3), everything(1, 3))
    sizes = Sizes({"torch.float32": 4, "torch.int64": 8}, (12,), ({"torch.float32": 12},), (0,))
    assert [row["shared"] for row in sync_bytes(plan, sizes, 3)] == [22 + 11] * 3


def test_the_bytes_of_a_message_are_bits_and_scales():
    assert [WIRE_FORMATS["int8"].bytes(entries) for entries in (0, 1, 256, 257)] == [0, 260, 260, 520]
    assert [WIRE_FORMATS[name].bytes(2560) for name in ("bf16", "int8", "int6", "int4", "int2")] == [
        *(5120, 2600, 1960, 1320, 660)
    ]
    assert WIRE_FORMATS["fp32"] is None
    two = WIRE_FORMATS["int2"]
    assert two is not None
    assert two.bytes(10**6) * 8 / 10**6 < 2.1
    assert two.for_values == WIRE_FORMATS["int8"] == two.for_values.for_values


@given(st.integers(0, 10**5), st.integers(2, 9), st.sampled_from(["bf16", "int8", "int6", "int4", "int2"]))
def test_workers_share_the_averaging_and_together_send_an_all_reduce_of_fewer_bits(entries, workers, name):
    wire = WIRE_FORMATS[name]
    shares = [wire.share(entries, worker, workers) for worker in range(workers)]
    assert [first for first, _ in shares] == [0, *(last for _, last in shares[:-1])]
    assert shares[-1][1] == wire.groups(entries)
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
    vectors = entries // 3
    sent = [wire.mean_bytes(entries - vectors, vectors, worker, workers) for worker in range(workers)]
    # Two bits are for matrices; vectors travel in 32.
    message = wire.bytes(entries) if name != "int2" else wire.bytes(entries - vectors) + 4 * vectors
    assert sum(sent) == 2 * (workers - 1) * message


def test_what_is_compressed_is_paid_for_by_each_worker():
    plan = plan_sync(everything(1, 3), everything(1, 3))
    sizes = Sizes({"f": 30}, (12,), ({"f": 0},), (0,), WIRE_FORMATS["int8"], (500, 100), ((450, 50),))
    # 1100 entries are 5 groups of 260 bytes: worker 0 averages 1 of them, workers 1 and 2 average 2 each.
    by_hand = [(4 + 1 * 2) * 260, (3 + 2 * 2) * 260, (3 + 2 * 2) * 260]
    assert [row["shared"] for row in sync_bytes(plan, sizes, 3)] == [40 + sent for sent in by_hand]

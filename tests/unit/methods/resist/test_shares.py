"""Shares in proportion to speed: as fast as any other counts, and equal if workers are equally fast."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resist_lightning.methods.resist.shares import (
    Cost,
    check_counts,
    measured_costs,
    measured_counts,
    share_out,
    shortest_step,
    slowest,
)
from resist_lightning.schedule.partition import blocks_per_worker, deal
from tests.helpers.partitions import settings

SECONDS = st.floats(1e-4, 10.0)
COSTS = st.lists(st.builds(Cost, st.floats(0.0, 10.0), SECONDS), min_size=1, max_size=6)


@given(COSTS, st.integers(0, 30), st.data())
def test_every_block_is_held_and_nobody_goes_below_the_minimum(costs, blocks, data):
    least = data.draw(st.integers(0, blocks))
    for counts in (shortest_step(costs, blocks, least), share_out(costs, blocks, least)):
        assert len(counts) == len(costs)
        assert least <= min(counts) <= max(counts) <= blocks
        assert sum(counts) == max(blocks, least * len(costs)) == sum(blocks_per_worker(blocks, len(costs), least))


@given(st.lists(st.builds(Cost, st.floats(0.0, 10.0), SECONDS), min_size=1, max_size=3), st.integers(0, 6), st.data())
def test_no_other_counts_are_quicker(costs, blocks, data):
    least = data.draw(st.integers(0, blocks))
    possible = [c for c in product(range(least, blocks + 1), repeat=len(costs)) if sum(c) >= blocks]
    assert possible
    assert slowest(costs, shortest_step(costs, blocks, least)) == min(slowest(costs, counts) for counts in possible)


@given(settings(), SECONDS, st.floats(1.0, 2.0), st.data())
def test_workers_within_noise_of_each_other_keep_the_equal_counts(setting, seconds, growth, data):
    blocks, workers, least, _, _ = setting
    few, many = measured_counts(blocks, workers, least)
    assume(few < many)
    noise = [data.draw(st.floats(1.0, 1.149)) for _ in range(workers)]
    rows = [[base * factor for factor in noise] for base in (seconds, seconds * growth)]
    costs = measured_costs((few, rows[0]), (many, rows[1]))
    assert len(set(costs)) == 1
    assert share_out(costs, blocks, least) == blocks_per_worker(blocks, workers, least)


@given(COSTS, st.integers(1, 9), st.integers(1, 9))
def test_exact_measurements_of_workers_that_differ_in_speed_alone_give_their_costs(costs, few, more):
    speeds = [1.0 + 0.5 * worker for worker in range(len(costs))]
    true = [Cost(costs[0].shared * speed, costs[0].block * speed) for speed in speeds]
    rows = [[cost.seconds(count) for cost in true] for count in (few, few + more)]
    found = measured_costs((few, rows[0]), (few + more, rows[1]))
    for cost, expected in zip(found, true, strict=True):
        assert cost.shared == pytest.approx(expected.shared, rel=1e-6, abs=1e-6 * (1 + expected.block))
        assert cost.block == pytest.approx(expected.block, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("costs", "blocks", "least", "counts"),
    [
        ([Cost(4, 1), Cost(12, 3)], 24, 0, (20, 4)),
        ([Cost(4, 1), Cost(12, 3)], 24, 5, (19, 5)),
        ([Cost(4, 1), Cost(4, 1), Cost(4, 1), Cost(12, 3)], 24, 2, (8, 7, 7, 2)),
        ([Cost(4, 1), Cost(400, 100)], 6, 0, (6, 0)),
        ([Cost(0, 1), Cost(0, 2)], 6, 0, (4, 2)),
        ([Cost(4, 1), Cost(12, 3)], 6, 6, (6, 6)),
        ([Cost(100, 1), Cost(300, 3)], 6, 0, (3, 3)),  # 3 % of a step are not worth unequal shares
        ([Cost(1, 0), Cost(3, 0)], 6, 0, (3, 3)),  # blocks that cost nothing
    ],
)
def test_counts_that_one_finds_by_hand(costs, blocks, least, counts):
    assert share_out(costs, blocks, least) == counts


def test_measurements_that_contradict_the_model_give_possible_costs():
    faster_with_more = measured_costs((3, [1.0, 3.0]), (6, [0.9, 2.9]))
    assert [(cost.shared, cost.block) for cost in faster_with_more] == [
        (pytest.approx(0.95), 0),
        (pytest.approx(2.95), 0),
    ]
    more_than_double = measured_costs((3, [1.0, 3.0]), (6, [9.0, 27.0]))
    assert [cost.shared for cost in more_than_double] == pytest.approx([0, 0])


@pytest.mark.parametrize(
    ("setting", "few_and_many"),
    [((22, 4, 5), (6, 12)), ((22, 4, 8), (8, 16)), ((12, 2, 1), (6, 12)), ((3, 5, 0), (1, 2)), ((4, 2, 4), (4, 4)),
     ((7, 1, 2), (7, 7)), ((0, 3, 0), (0, 0))],
)  # fmt: skip
def test_few_and_many(setting, few_and_many):
    assert measured_counts(*setting) == few_and_many


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 10**6))
def test_any_counts_that_pass_the_check_can_be_dealt(counts, blocks, round):
    try:
        check_counts(counts, blocks, len(counts), 0)
    except ValueError:
        assert max(counts) > blocks or sum(counts) < blocks
        return
    partition = deal(blocks, tuple(counts), 3, round)
    assert [len(set(held)) for held in partition.held] == counts
    holders = [len(partition.holders(block)) for block in range(blocks)]
    assert min(holders, default=1) >= 1
    assert max(holders, default=0) - min(holders, default=0) <= 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 4, 1], r"blocks_per_worker=\[2, 4, 1\] has 3 number\(s\) for 2 worker\(s\)"),
        ([2, 7], "more than the 6 partitionable"),
        ([1, 5], "below min_blocks=2.*lower min_blocks"),
        ([2, 3], "adds up to 5, but there are 6 .* Give 1 more"),
    ],
)
def test_impossible_counts_name_the_limit(counts, message):
    with pytest.raises(ValueError, match=message):
        check_counts(counts, 6, 2, 2)

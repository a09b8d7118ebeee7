"""Contracts 1 and 2: every worker derives the same partition, and every block is held (spec 2.3 and 8.6)."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.schedule.partition import blocks_per_worker, draw_partition, everything
from tests.helpers.partitions import of_holders, settings


@pytest.mark.parametrize(
    ("blocks", "workers", "min_blocks", "counts"),
    [
        (22, 4, 0, (6, 6, 5, 5)),
        (22, 4, 5, (6, 6, 5, 5)),
        (22, 4, 6, (6, 6, 6, 6)),
        (22, 2, 5, (11, 11)),
        (22, 8, 5, (5,) * 8),
        (22, 8, 0, (3, 3, 3, 3, 3, 3, 2, 2)),
        (3, 5, 0, (1, 1, 1, 0, 0)),
        (4, 3, 4, (4, 4, 4)),
        (7, 1, 2, (7,)),
        (0, 3, 0, (0, 0, 0)),
    ],
)
def test_counts_of_the_paper_and_of_the_corners(blocks, workers, min_blocks, counts):
    assert blocks_per_worker(blocks, workers, min_blocks) == counts
    assert tuple(map(len, draw_partition(blocks, workers, min_blocks, 0, 0).held)) == counts


@given(settings())
def test_everyone_gets_an_equal_share_and_never_less_than_the_minimum(setting):
    blocks, workers, minimum, _, _ = setting
    counts = blocks_per_worker(blocks, workers, minimum)
    assert len(counts) == workers
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)
    assert minimum <= min(counts)
    assert max(counts) <= blocks
    assert sum(counts) == (blocks if blocks // workers >= minimum else max(blocks, workers * minimum))


@given(settings())
def test_sizes_are_the_counts_and_no_worker_holds_a_block_twice(setting):
    blocks, workers, minimum, _, _ = setting
    partition = draw_partition(*setting)
    assert (partition.blocks, partition.workers) == (blocks, workers)
    assert tuple(map(len, partition.held)) == blocks_per_worker(blocks, workers, minimum)
    for held in partition.held:
        assert list(held) == sorted(set(held))
        assert set(held) <= set(range(blocks))


@given(settings())
def test_every_block_is_held_and_numbers_of_holders_differ_by_at_most_one(setting):
    partition = draw_partition(*setting)
    holders = Counter(block for held in partition.held for block in held)
    assert set(holders) == set(range(partition.blocks))
    if holders:
        assert max(holders.values()) - min(holders.values()) <= 1
    for block in range(partition.blocks):
        assert partition.holders(block) == tuple(w for w in range(partition.workers) if block in partition.held[w])


@given(settings())
def test_without_overlap_every_block_has_one_holder(setting):
    blocks, workers, _, seed, round = setting
    partition = draw_partition(blocks, workers, blocks // workers, seed, round)
    assert sorted(block for held in partition.held for block in held) == list(range(blocks))


@given(settings(), st.integers())
def test_no_global_generator_is_read_or_moved(setting, noise):
    expected = draw_partition(*setting)
    random.seed(noise)
    np.random.seed(abs(noise) % 2**32)
    torch.manual_seed(abs(noise) % 2**63)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert draw_partition(*setting) == expected
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    ("arguments", "held"),
    [
        ((6, 2, 0, 0, 0), ((0, 2, 4), (1, 3, 5))),
        ((6, 2, 0, 0, 1), ((1, 3, 4), (0, 2, 5))),
        ((6, 2, 0, 1, 0), ((0, 3, 4), (1, 2, 5))),
        ((22, 4, 5, 42, 7), ((0, 4, 5, 6, 17, 19), (1, 9, 13, 16, 20, 21), (3, 7, 11, 14, 18), (2, 8, 10, 12, 15))),
        ((7, 3, 4, 3, 10**6), ((0, 3, 4, 5), (1, 2, 4, 6), (0, 3, 5, 6))),
        ((2, 4, 0, 5, 2), ((1,), (0,), (), ())),
    ],
)
def test_golden_values(arguments, held):
    """Fixed values: with another generator, a resumed run would draw another partition."""
    assert draw_partition(*arguments).held == held


def test_different_rounds_and_different_seeds_differ():
    rounds = [draw_partition(22, 4, 0, 0, round) for round in range(100)]
    seeds = [draw_partition(22, 4, 0, seed, 0) for seed in range(100)]
    assert len(set(rounds)) == len(rounds)
    assert len(set(seeds)) == len(seeds)


def test_seed_and_round_are_not_interchangeable():
    assert draw_partition(22, 4, 0, 1, 11) != draw_partition(22, 4, 0, 11, 1) != draw_partition(22, 4, 0, 1, 1)


@pytest.mark.parametrize(("blocks", "workers", "minimum", "count"), [(6, 3, 0, 2), (5, 3, 3, 3), (8, 2, 0, 4)])
def test_every_worker_gets_every_block_equally_often(blocks, workers, minimum, count):
    rounds = 2000
    held = Counter(
        (worker, block)
        for round in range(rounds)
        for worker, own in enumerate(draw_partition(blocks, workers, minimum, 0, round).held)
        for block in own
    )
    expected = rounds * count / blocks
    deviation = (rounds * (count / blocks) * (1 - count / blocks)) ** 0.5
    assert len(held) == workers * blocks
    assert all(abs(times - expected) < 4.5 * deviation for times in held.values())


def test_a_round_does_not_depend_on_the_one_before():
    """A block stays with probability 1/3 with 3 workers, and neighbours stay together with (n - 1)/(L - 1)."""
    rounds = [draw_partition(6, 3, 0, 9, round) for round in range(2000)]
    stays = sum(a.holders(b) == z.holders(b) for a, z in pairwise(rounds) for b in range(6))
    together = sum(p.holders(b) == p.holders(b + 1) for p in rounds for b in range(5))
    assert abs(stays / (1999 * 6) - 1 / 3) < 0.025
    assert abs(together / (2000 * 5) - 1 / 5) < 0.025


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0, 0), r"workers must be at least 1, got 0"),
        ((4, 2, 5), r"min_blocks=5 .*4 partitionable.*Lower min_blocks"),
        ((4, 2, -1), r"min_blocks=-1 .*between 0 and 4"),
        ((0, 2, 1), r"min_blocks=1 .*0 partitionable"),
    ],
)
def test_impossible_arguments_name_the_value_and_the_limit(arguments, message):
    with pytest.raises(ValueError, match=message):
        blocks_per_worker(*arguments)
    with pytest.raises(ValueError, match=message):
        draw_partition(*arguments, 0, 0)


def test_everything_on_everyone():
    assert everything(3, 2).held == ((0, 1, 2), (0, 1, 2))
    assert everything(3, 2) == of_holders([{0, 1}] * 3, 2)
    assert everything(0, 2).held == ((), ())

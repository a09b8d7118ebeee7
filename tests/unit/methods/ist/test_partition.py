"""Partitions of neurons: the rules of IST, and that all workers draw the same."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.ist.partition import draw_neurons, kept_rows

SEEDS, ROUNDS = st.integers(0, 2**40), st.integers(0, 10**6)


@st.composite
def drawn(draw):
    """Widths, workers, seed and round, all valid."""
    workers = draw(st.integers(1, 9))
    widths = draw(st.lists(st.integers(workers, 40), min_size=1, max_size=4))
    return tuple(widths), workers, draw(SEEDS), draw(ROUNDS)


@given(drawn())
def test_every_neuron_goes_to_exactly_one_worker_and_shares_differ_by_at_most_one(setting):
    widths, workers, seed, round = setting
    partitions = draw_neurons(widths, workers, seed, round)
    assert len(partitions) == len(widths)
    for width, partition in zip(widths, partitions, strict=True):
        assert (partition.blocks, partition.workers) == (width, workers)
        assert sorted(neuron for held in partition.held for neuron in held) == list(range(width))
        assert all(list(held) == sorted(held) for held in partition.held)
        sizes = {len(held) for held in partition.held}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


@given(drawn())
def test_the_same_is_drawn_everywhere_and_no_generator_is_read_or_moved(setting):
    random.seed(1)
    torch.manual_seed(1)
    first, states = draw_neurons(*setting), (random.getstate(), torch.get_rng_state())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(2)
    torch.manual_seed(2)
    assert draw_neurons(*setting) == first


def test_the_deal_is_the_same_in_every_version():
    """A checkpoint of today must find its neurons tomorrow."""
    first, second = draw_neurons((5, 6), 2, 3, 7)
    assert first.held == ((2, 3, 4), (0, 1))
    assert second.held == ((1, 2, 3), (0, 4, 5))


@pytest.mark.parametrize("other", [{"seed": 1}, {"round": 1}])
def test_every_round_and_every_seed_has_a_deal_of_its_own(other):
    usual = {"seed": 0, "round": 0}
    assert draw_neurons((40,), 2, **usual) != draw_neurons((40,), 2, **{**usual, **other})


def test_layers_are_dealt_independently_of_each_other_and_of_layers_before_them():
    first, second = draw_neurons((40, 40), 2, 0, 0)
    assert first != second
    assert draw_neurons((40, 10), 2, 0, 0)[0] == first
    assert draw_neurons((10, 40), 2, 0, 0)[1] == second


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_an_entry_of_an_inner_matrix_is_active_as_often_as_there_are_workers(workers):
    """Check 10 of section 8: once in n rounds, whichever entry it is; five standard errors."""
    widths, rounds = (12, 12), 1000
    active = torch.zeros(widths)
    for round in range(rounds):
        rows, columns = draw_neurons(widths, workers, 0, round)
        for mine, others in zip(rows.held, columns.held, strict=True):
            active[torch.tensor(mine).unsqueeze(1), torch.tensor(others)] += 1
        assert active.sum() == (round + 1) * 12 * 12 / workers, "of a divisible layer exactly 1 / n is trained"
    chance = 1 / workers
    error = (chance * (1 - chance) / rounds) ** 0.5
    assert (active / rounds - chance).abs().max() < 5 * error


def test_any_two_neurons_of_a_layer_meet_as_often_as_any_others():
    """A uniform deal of 8 to 2: two neurons are together with the chance 3 / 7; five standard errors."""
    rounds = 1500
    together = dict.fromkeys(combinations(range(8), 2), 0)
    for round in range(rounds):
        (partition,) = draw_neurons((8,), 2, 5, round)
        for held in partition.held:
            for pair in combinations(held, 2):
                together[pair] += 1
    chance = 3 / 7
    error = (chance * (1 - chance) / rounds) ** 0.5
    assert max(abs(count / rounds - chance) for count in together.values()) < 5 * error


@given(st.integers(1, 60), st.integers(1, 9))
def test_every_row_has_one_keeper_and_keepers_have_equal_shares(width, workers):
    kept = [kept_rows(width, workers, worker) for worker in range(workers)]
    assert [row for rows in kept for row in rows] == list(range(width))
    assert max(map(len, kept)) - min(map(len, kept)) <= 1


@given(drawn(), st.floats(0, 1))
def test_with_a_least_share_neurons_have_as_many_holders_as_one_another_or_one_more(setting, share):
    widths, workers, seed, round = setting
    for width, partition in zip(widths, draw_neurons(widths, workers, seed, round, share), strict=True):
        sizes = {len(held) for held in partition.held}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= share * width - 1e-6
        holders = [len(partition.holders(neuron)) for neuron in range(width)]
        assert min(holders) >= 1
        assert max(holders) - min(holders) <= 1
    assert draw_neurons(widths, workers, seed, round, 1.0)[0].held == (tuple(range(widths[0])),) * workers


def test_workers_that_share_neurons_in_a_layer_are_not_those_that_share_them_in_the_next():
    """Else 7 of 8 entries of an inner matrix would train in a round, where 69 of 70 can."""
    trained, rounds = 0, 40
    for round in range(rounds):
        rows, columns = draw_neurons((16, 16), 8, 3, round, 0.5)
        pairs = {(row, column) for w in range(8) for row in rows.held[w] for column in columns.held[w]}
        trained += len(pairs)
    assert trained / rounds / 256 > 0.92

"""The closed form of the bytes that workers send at a sync (check 8 of section 8)."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.ist.bytes import sent_entries
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import draw_neurons
from resist_lightning.methods.ist.plan import NeuronPlan
from tests.helpers.neuron_plans import CUTS, INNER, entries, place, plans

KINDS = st.sampled_from(list(CUTS.values()))


@given(plans(), KINDS)
def test_the_closed_form_counts_every_entry_that_is_with_another_worker_next(plan, cut):
    """Counted from each entry's two places and nothing else."""
    sent = [0] * plan.before[0].workers
    for entry in entries(cut, plan.before):
        (old, _), (new, _) = place(cut, plan.before, entry), place(cut, plan.after, entry)
        sent[old] += old != new
    whole = 1 if cut in INNER else 2  # `entries` gives a side without neurons two rows or columns
    assert [whole * count for count in sent_entries(cut, plan)] == sent


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_the_mean_of_the_closed_form_over_many_rounds_is_the_one_that_is_promised(workers):
    """Within four standard errors."""
    rows, columns, syncs = 24, 12, 400
    sent = []
    for round in range(0, 2 * syncs, 2):
        plan = NeuronPlan(*(draw_neurons((rows, columns), workers, 3, round + next) for next in (0, 1)))
        sent.append(sum(sent_entries(Cut(0, 1), plan)) / workers)
    error = stdev(sent) / syncs**0.5
    assert error < 0.01 * rows * columns / workers
    assert fmean(sent) == pytest.approx(mean_entries(rows, columns, workers), abs=4 * error)
    assert mean_entries(rows, columns, 1) == 0


@given(plans(), KINDS)
def test_a_round_that_deals_the_same_again_sends_nothing(plan, cut):
    same = NeuronPlan(plan.before, plan.before)
    assert sent_entries(cut, same) == [0] * plan.before[0].workers


def mean_entries(rows: int, columns: int, workers: int) -> float:
    """The formula of docs/ist.md: entries of an inner matrix that a worker sends, in the mean over partitions.

    Of the rows * columns / S entries that are trained, 1 / S go straight to the next holder; the others go to their
    keeper, and as many come from one. For 1 / S of all of these the next place is on the same worker.
    """
    trained = rows * columns / workers
    return trained * (2 - 1 / workers) * (1 - 1 / workers) / workers

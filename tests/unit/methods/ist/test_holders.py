"""Syncs of neurons with several holders, on paper: means at one place for each entry, and from there to all holders."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.ist.bytes import merged_entries, sent_entries
from resist_lightning.methods.ist.holders import handed_over_pieces, merged_pieces, staying_pieces, whole_pieces
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.partition import draw_neurons
from resist_lightning.methods.ist.plan import NeuronPlan
from tests.helpers.neuron_plans import CUTS, INNER, entries, keeper, members
from tests.helpers.partitions import of_holders

KINDS = st.sampled_from(list(CUTS.values()))


@st.composite
def plans(draw):
    """Plans of two layers in which some neuron has several holders: as drawn by IST, or arbitrary ones."""
    workers = draw(st.integers(2, 5))
    widths = draw(st.tuples(st.integers(workers, 9), st.integers(workers, 9)))
    left_out = draw(st.sampled_from([(), (1,)]))
    if draw(st.booleans()):
        seed, first, then = draw(st.integers(0, 2**40)), draw(st.floats(0, 1)), draw(st.sampled_from([0.8, 1]))
        before, after = draw_neurons(widths, workers, seed, 3, first), draw_neurons(widths, workers, seed, 4, then)
        return NeuronPlan(before, after, left_out)
    someone = st.sets(st.integers(0, workers - 1), min_size=1)

    def partition(width):
        return of_holders([{0, 1}, *draw(st.lists(someone, min_size=width - 1, max_size=width - 1))], workers)

    return NeuronPlan(tuple(map(partition, widths)), tuple(map(partition, widths)), left_out)


def everywhere(planned, cut, plan):
    """All workers' pieces, each once; checks that both ends list them in the same order."""
    lists = [planned(cut, plan, worker) for worker in range(plan.before[0].workers)]
    for worker, found in enumerate(lists):
        for peer, other in enumerate(lists):
            assert [p for p in found if (p.source, p.target) == (worker, peer)] == [
                p for p in other if (p.source, p.target) == (worker, peer)
            ]
        for piece in found:
            assert worker in (piece.source, piece.target)
            assert () not in (piece.rows, piece.columns), "an empty message"
    return [piece for worker, found in enumerate(lists) for piece in found if piece.source == worker]


def holders(cut, held, entry):
    """The workers that hold an entry, derived from each worker's neurons."""
    sides = [(cut.rows, entry[0]), (cut.columns, entry[1])]
    return {
        worker
        for worker in range(held[0].workers)
        if all(layer is None or neuron in held[layer].held[worker] for layer, neuron in sides)
    }


def counting(cut, plan, entry):
    """The holders before the sync whose values count."""
    old = holders(cut, plan.before, entry)
    return old - set(plan.left_out) or old


@given(plans(), KINDS)
def test_after_the_means_and_the_hand_over_every_holder_has_the_mean_of_all_holders(plan, cut):
    gathered = defaultdict(set)  # by place and entry, the workers whose values arrived
    for piece in everywhere(merged_pieces, cut, plan):
        for entry in members(piece, cut):
            assert piece.source in holders(cut, plan.before, entry)
            assert piece.source not in gathered[piece.target, entry]
            gathered[piece.target, entry].add(piece.source)
    arrived = Counter()
    for piece in everywhere(handed_over_pieces, cut, plan):
        for entry in members(piece, cut):
            old, found = counting(cut, plan, entry), gathered[piece.source, entry]
            if cut in INNER:
                # Its keeper has it in any case, and counts left-out workers only if no other holds it.
                assert piece.source == keeper(plan.before[cut.rows].blocks, plan.before[0].workers, entry[0])
                assert found == holders(cut, plan.before, entry)
            else:
                assert found == old if len(old) > 1 else old == {piece.source}
            arrived[piece.target, entry] += 1
    for entry in entries(cut, plan.before):
        for worker in range(plan.before[0].workers):
            assert arrived[worker, entry] == (worker in holders(cut, plan.after, entry))


@given(plans(), KINDS)
def test_the_closed_form_counts_what_goes_to_another_worker(plan, cut):
    if not plan.several_holders:
        return
    whole = 1 if cut in INNER else 2  # `entries` gives a side without neurons two rows or columns
    for planned, formula in ((merged_pieces, merged_entries), (handed_over_pieces, sent_entries)):
        sent = [0] * plan.before[0].workers
        for piece in everywhere(planned, cut, plan):
            sent[piece.source] += len(members(piece, cut)) * (piece.source != piece.target)
        assert [whole * count for count in formula(cut, plan)] == sent


@given(plans(), KINDS)
def test_every_entry_of_the_full_model_comes_from_one_worker(plan, cut):
    found = [piece for worker in range(plan.before[0].workers) for piece in whole_pieces(cut, plan, worker)]
    assert Counter(e for piece in found for e in members(piece, cut)) == Counter(entries(cut, plan.before))
    for piece in found:
        assert (piece.target, piece.enters) == (0, "full")
        assert (piece.leaves == "store") == (cut in INNER)


@given(plans(), KINDS)
def test_what_stays_is_what_a_worker_holds_before_and_after(plan, cut):
    for worker in range(plan.before[0].workers):
        found = Counter(e for piece in staying_pieces(cut, plan, worker) for e in members(piece, cut))
        assert found == Counter(
            e for e in entries(cut, plan.before) if worker in holders(cut, plan.before, e) & holders(cut, plan.after, e)
        )


def test_where_all_hold_all_a_sync_sends_as_much_as_an_all_reduce():
    """Owners and keepers are spread evenly, so no worker sends more than 2 (S - 1) / S of the tensor."""
    workers, widths = 4, (8, 16)
    plan = NeuronPlan(*(draw_neurons(widths, workers, 0, round, 1.0) for round in (0, 1)))
    for cut, size in ((Cut(0, None), 8), (Cut(None, 1), 16), (Cut(0, 1), 8 * 16)):
        sent = [sum(both) for both in zip(merged_entries(cut, plan), sent_entries(cut, plan), strict=True)]
        assert sent == [2 * (workers - 1) * size // workers] * workers

"""Contracts 3 and 4 for neurons, on paper: every entry gets to its place in the next round, and only once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.plan import NeuronPlan, Piece, first_pieces, full_pieces, pieces
from tests.helpers.neuron_plans import CUTS, INNER, entries, members, place, plans
from tests.helpers.partitions import of_holders

KINDS = st.sampled_from(list(CUTS.values()))
World = dict[tuple[int, str, tuple[int, int]], tuple[int, int]]


def all_pieces(cut: Cut, plan: NeuronPlan) -> list[Piece]:
    """All pieces, each once: one between two workers is in the lists of both."""
    workers = range(plan.before[0].workers)
    return [piece for worker in workers for piece in pieces(cut, plan, worker) if piece.source == worker]


def world(cut: Cut, plan: NeuronPlan) -> World:
    """Every current place of an entry has the entry itself, and stale places of stores have nothing."""
    return {(*place(cut, plan.before, entry), entry): entry for entry in entries(cut, plan.before)}


@given(plans(), KINDS)
def test_following_the_pieces_from_where_all_was_gives_where_all_is_next(plan, cut):
    before = world(cut, plan)
    after = {where: value for where, value in before.items() if where[1] == "store"}
    for piece in all_pieces(cut, plan):
        for entry in members(piece, cut):
            after[piece.target, piece.enters, entry] = before[piece.source, piece.leaves, entry]
    for entry in entries(cut, plan.before):
        assert after[(*place(cut, plan.after, entry), entry)] == entry


@given(plans(), KINDS)
def test_every_entry_is_in_exactly_one_piece_or_stays_in_its_store(plan, cut):
    seen = Counter(entry for piece in all_pieces(cut, plan) for entry in members(piece, cut))
    for entry in entries(cut, plan.before):
        old, new = place(cut, plan.before, entry), place(cut, plan.after, entry)
        assert seen[entry] == (0 if old == new and old[1] == "store" else 1), (entry, old, new)
    for piece in all_pieces(cut, plan):
        for entry in members(piece, cut):
            assert (piece.source, piece.leaves) == place(cut, plan.before, entry)
            assert (piece.target, piece.enters) == place(cut, plan.after, entry)


@given(plans(), KINDS)
def test_when_the_training_starts_every_entry_goes_from_worker_0_to_its_place(plan, cut):
    found = [piece for worker in range(plan.before[0].workers) for piece in first_pieces(cut, plan.before, worker)]
    assert all((piece.source, piece.leaves) == (0, "full") for piece in found)
    arrived = Counter((piece.target, piece.enters, entry) for piece in found for entry in members(piece, cut))
    assert arrived == Counter((*place(cut, plan.before, entry), entry) for entry in entries(cut, plan.before))


@given(plans(), KINDS)
def test_both_ends_of_every_pair_list_the_same_pieces_in_the_same_order(plan, cut):
    workers = range(plan.before[0].workers)
    lists = [pieces(cut, plan, worker) for worker in workers]
    for worker in workers:
        assert all(worker in (piece.source, piece.target) for piece in lists[worker])
    for source in workers:
        for target in workers:
            sent, received = (
                [piece for piece in lists[end] if (piece.source, piece.target) == (source, target)]
                for end in (source, target)
            )
            assert sent == received
            assert all(piece.rows != () and piece.columns != () for piece in sent), "an empty message"


@given(plans(), KINDS)
def test_indices_ascend_as_positions_in_slices_need(plan, cut):
    for piece in all_pieces(cut, plan):
        for indices in (piece.rows, piece.columns):
            assert indices is None or list(indices) == sorted(set(indices))


@given(plans(), KINDS)
def test_a_matrix_with_neurons_on_one_side_has_no_store(plan, cut):
    if cut not in INNER:
        assert {(piece.leaves, piece.enters) for piece in all_pieces(cut, plan)} == {("slice", "slice")}


@given(plans(), KINDS)
def test_the_full_pieces_of_all_workers_have_every_entry_once_from_where_it_is(plan, cut):
    workers = range(plan.before[0].workers)
    found = [piece for worker in workers for piece in full_pieces(cut, plan.before, worker)]
    assert Counter(e for piece in found for e in members(piece, cut)) == Counter(entries(cut, plan.before))
    for piece in found:
        assert (piece.target, piece.enters) == (0, "full")
        for entry in members(piece, cut):
            assert (piece.source, piece.leaves) == place(cut, plan.before, entry)


@given(plans(), KINDS)
def test_a_round_that_deals_the_same_again_sends_nothing(plan, cut):
    same = NeuronPlan(plan.before, plan.before)
    assert all(piece.source == piece.target for piece in all_pieces(cut, same))


def test_the_picture_of_the_docstring():
    """Rows 0 to 3 go from worker 1 to worker 0; of the columns it had 0, 1, and the next one will have 1, 2."""
    rows = of_holders([{1}] * 4, 2), of_holders([{0}] * 4, 2)
    columns = of_holders([{1}, {1}, {0}, {0}], 2), of_holders([{1}, {0}, {0}, {1}], 2)
    plan = NeuronPlan((rows[0], columns[0]), (rows[1], columns[1]))
    assert pieces(Cut(0, 1), plan, 0) == [
        Piece(1, 0, (0, 1, 2, 3), (1,)),
        Piece(1, 0, (0, 1), (0,), enters="store"),
        Piece(0, 0, (0, 1), (2,), leaves="store"),
        Piece(1, 0, (2, 3), (2,), leaves="store"),
    ]
    assert pieces(Cut(0, 1), plan, 1) == [
        Piece(1, 0, (0, 1, 2, 3), (1,)),
        Piece(1, 0, (0, 1), (0,), enters="store"),
        Piece(1, 1, (2, 3), (0,), enters="store"),
        Piece(1, 0, (2, 3), (2,), leaves="store"),
    ]

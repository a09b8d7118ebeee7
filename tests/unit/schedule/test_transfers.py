"""Contracts 3 and 4, on paper: the plan gives every next holder the mean over the last holders, and sends no more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resist_lightning.schedule.partition import Partition, draw_partition, everything
from resist_lightning.schedule.transfers import SyncPlan, Transfer, plan_assembly, plan_collection, plan_sync
from tests.helpers.partitions import of_holders, settings, two_partitions

Values = dict[tuple[int, int], Fraction]


def trained(partition: Partition) -> Values:
    """A different number for every (worker, block) that is held; powers of three, so no two sums are equal."""
    held = [(worker, block) for worker, blocks in enumerate(partition.held) for block in blocks]
    return {place: Fraction(3**power) for power, place in enumerate(held)}


def execute(plan: SyncPlan, values: Values, workers: int) -> Values:
    """The workers' values after executing a plan on their own values alone."""
    values = dict(values)
    for block in plan.averaged:
        mean = sum(values[worker, block] for worker in range(workers)) / workers
        values.update({(worker, block): mean for worker in range(workers)})
    for block, owner in plan.owner.items():
        collected = [values[transfer.source, block] for transfer in plan.merge if transfer.block == block]
        values[owner, block] = (values[owner, block] + sum(collected)) / (1 + len(collected))
    arriving = {(t.target, t.block): values[t.source, t.block] for t in plan.hand_over}
    return {**values, **arriving}


@given(two_partitions())
def test_every_next_holder_gets_exactly_the_mean_over_the_last_holders(partitions):
    before, after = partitions
    values = trained(before)
    result = execute(plan_sync(before, after), values, before.workers)
    for block in range(before.blocks):
        old = [values[worker, block] for worker in before.holders(block)]
        for worker in after.holders(block):
            assert result[worker, block] == sum(old) / len(old)


@given(two_partitions())
def test_only_what_is_held_is_sent_and_only_to_those_who_need_it(partitions):
    before, after = partitions
    plan = plan_sync(before, after)
    for transfer in (*plan.merge, *plan.hand_over):
        assert transfer.source != transfer.target
    for transfer in plan.merge:
        assert {transfer.source, transfer.target} <= set(before.holders(transfer.block))
        assert transfer.target == plan.owner[transfer.block]
    for transfer in plan.hand_over:
        assert transfer.source == plan.owner[transfer.block]
        assert transfer.target in after.holders(transfer.block)
    for transfers in (plan.merge, plan.hand_over):
        assert max(Counter(transfers).values(), default=1) == 1
    assert set(plan.owner) | set(plan.averaged) == set(range(before.blocks))
    assert not set(plan.owner) & set(plan.averaged)


@given(two_partitions())
def test_a_block_that_stays_with_its_only_holder_is_not_sent(partitions):
    before, after = partitions
    plan = plan_sync(before, after)
    staying = {b for b in range(before.blocks) if before.holders(b) == after.holders(b) and len(after.holders(b)) == 1}
    assert not staying & {transfer.block for transfer in (*plan.merge, *plan.hand_over)}
    assert before.workers == 1 or not staying & set(plan.averaged)


@given(two_partitions())
def test_the_number_of_transfers_is_the_closed_form(partitions):
    """Section 5 of the design: (holders before - 1) to merge, (new holders without the merged value) to spread."""
    before, after = partitions
    plan = plan_sync(before, after)
    merges, spreads = Counter(t.block for t in plan.merge), Counter(t.block for t in plan.hand_over)
    for block in range(before.blocks):
        old, new = set(before.holders(block)), set(after.holders(block))
        if len(old) == len(new) == before.workers > 1:
            assert block in plan.averaged
            assert (merges[block], spreads[block]) == (0, 0)
        else:
            assert merges[block] == len(old) - 1
            assert spreads[block] == len(new) - (1 if old & new else 0)


@given(settings())
def test_without_overlap_nothing_is_merged_and_a_block_moves_at_most_once(setting):
    blocks, workers, _, seed, round = setting
    before = draw_partition(blocks, workers, 0, seed, round)
    after = draw_partition(blocks, workers, 0, seed, round + 1)
    assume(workers > 1)
    plan = plan_sync(before, after)
    moved = [(before.holders(b)[0], after.holders(b)[0], b) for b in range(blocks)]
    assert plan.merge == ()
    assert plan.averaged == ()
    assert {(t.source, t.target, t.block) for t in plan.hand_over} == {(s, t, b) for s, t, b in moved if s != t}


def test_the_picture_of_the_docstring():
    before = of_holders([{0, 1, 2}, {0, 1}, {2}, {0}], 3)
    after = of_holders([{0, 1, 2}, {2}, {1}, {0}], 3)
    plan = plan_sync(before, after)
    assert plan.averaged == (0,)
    assert plan.owner == {1: 0, 2: 2, 3: 0}
    assert plan.merge == (Transfer(1, 0, 1),)
    assert plan.hand_over == (Transfer(0, 2, 1), Transfer(2, 1, 2))


def test_an_owner_that_also_holds_the_block_in_the_next_round_saves_a_transfer():
    plan = plan_sync(of_holders([{0, 1, 2}], 4), of_holders([{2, 3}], 4))
    assert plan.owner == {0: 2}
    assert plan.hand_over == (Transfer(2, 3, 0),)


def test_among_equals_the_work_of_owners_is_spread():
    plan = plan_sync(of_holders([{0, 1}] * 6, 3), of_holders([{2}] * 6, 3))
    assert Counter(plan.owner.values()) == {0: 3, 1: 3}


@given(two_partitions())
def test_an_observation_gives_everyone_what_the_sync_would_make(partitions):
    before, after = partitions
    workers, values = before.workers, trained(before)
    sync = plan_sync(before, after)
    parts = [plan_assembly(sync, worker, workers) for worker in range(workers)]
    plan = together(parts)
    seen, synced = execute(plan, values, workers), execute(sync, values, workers)
    assert (plan.averaged, plan.owner, plan.merge) == (sync.averaged, sync.owner, sync.merge)
    assert set(seen) == {(worker, block) for worker in range(workers) for block in range(before.blocks)}
    for block in range(before.blocks):
        old = [values[worker, block] for worker in before.holders(block)]
        assert {seen[worker, block] for worker in range(workers)} == {sum(old) / len(old)}
        assert all(synced[worker, block] == seen[worker, block] for worker in after.holders(block))
    assert max(Counter(plan.hand_over).values(), default=1) == 1
    for worker, part in enumerate(parts):
        assert [t for t in plan.hand_over if worker in (t.source, t.target)] == sorted(part.hand_over, key=by_block)


@given(two_partitions())
def test_worker_0_collects_what_it_lacks_from_the_holders_and_the_mean_is_the_syncs(partitions):
    before, after = partitions
    values, sync = trained(before), plan_sync(before, after)
    unequal, equal = (plan_collection(sync, unequal=each) for each in (True, False))
    assert unequal.keys() == equal.keys() == set(range(before.blocks)) - set(sync.averaged)
    for block, workers in unequal.items():
        old = before.holders(block)
        assert workers[0] == sync.owner[block]
        assert sorted(workers) == sorted(old)
        assert sum(values[worker, block] for worker in workers) / len(workers) == sum(
            values[worker, block] for worker in old
        ) / len(old)
        # If all holders are equal, one of them sends, and only if worker 0 is not a holder.
        assert equal[block] == (() if 0 in old else (sync.owner[block],))


def by_block(transfer: Transfer) -> tuple[int, int]:
    return transfer.block, transfer.target


def together(parts: list[SyncPlan]) -> SyncPlan:
    """The workers' plans of an observation as one; both ends of a transfer must list it."""
    seen = Counter(transfer for part in parts for transfer in part.hand_over)
    assert set(seen.values()) <= {2}
    return replace(parts[0], hand_over=tuple(sorted(seen, key=by_block)))


@given(two_partitions(), st.data())
def test_a_worker_that_is_left_out_counts_only_for_what_it_alone_held_and_still_gets_its_blocks(partitions, data):
    before, after = partitions
    left_out = tuple(data.draw(st.sets(st.integers(0, before.workers - 1), max_size=before.workers - 1)))
    values = trained(before)
    plan = plan_sync(before, after, left_out)
    assert plan.left_out == left_out
    counted = {key: values[key] for key in values if key[0] not in left_out or not _others(before, key[1], left_out)}
    synced = execute(plan, counted, before.workers)
    for block in range(before.blocks):
        old = [counted[worker, block] for worker in before.holders(block) if (worker, block) in counted]
        assert {synced[worker, block] for worker in after.holders(block)} == {sum(old) / len(old)}


def _others(partition, block, left_out):
    return set(partition.holders(block)) - set(left_out)


def test_one_worker_alone_sends_nothing():
    plan = plan_sync(everything(5, 1), everything(5, 1))
    assert plan == SyncPlan((), dict.fromkeys(range(5), 0), (), ())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (everything(3, 2), everything(4, 2), "3 blocks on 2 workers to 4 on 2"),
        (everything(3, 2), everything(3, 3), "3 blocks on 2 workers to 3 on 3"),
        (Partition(((0,), ()), 2), everything(2, 2), "block 1 has no holder before"),
        (everything(2, 2), Partition(((), (1,)), 2), "block 0 has no holder after"),
    ],
)
def test_a_block_is_never_lost_silently(before, after, message):
    with pytest.raises(ValueError, match=message):
        plan_sync(before, after)

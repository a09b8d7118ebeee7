"""Each sync covers one fragment: holders of blocks by round, for any counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.schedule.fragments import counts_of_fragments, fragment_of_block, plan_of_fragment, spread
from resist_lightning.schedule.partition import blocks_per_worker
from resist_lightning.schedule.transfers import plan_sync


@st.composite
def schedules(draw) -> Schedule:
    """Schedules in which every worker holds a block of each fragment, with or without a warm-up and later stages."""
    blocks, workers = draw(st.integers(1, 24)), draw(st.integers(1, 6))
    least = draw(st.integers(0, blocks))
    fewest = min(blocks_per_worker(blocks, workers, least))
    fragments = draw(st.integers(1, max(fewest, 1)))
    if fewest < fragments:
        least = fragments
    warmup = draw(st.integers(0, 3))
    stages = ((warmup, least), (warmup + 5, blocks)) if draw(st.booleans()) else ()
    finish = draw(st.none() | st.integers(warmup + 4, 12))
    return Schedule(blocks, workers, least, draw(st.integers(0, 99)), warmup, stages, finish, fragments=fragments)


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_counts_of_fragments_add_up_and_leave_no_block_without_a_holder(blocks, workers, data):
    least = data.draw(st.integers(0, blocks))
    counts = blocks_per_worker(blocks, workers, least)
    fragments = data.draw(st.integers(1, max(min(counts), 1)))
    table = counts_of_fragments(blocks, counts, fragments)
    assert tuple(map(sum, zip(*table, strict=True))) == counts
    for fragment, row in enumerate(table):
        size = len(range(fragment, blocks, fragments))
        assert max(row) <= size <= sum(row)
        if min(counts) >= fragments:
            assert min(row) >= 1  # so every worker may get every block


@given(schedules())
def test_every_round_has_all_blocks_and_each_worker_as_many_as_without_fragments(schedule):
    for round in range(14):
        partition = schedule.partition(round)
        whole = replace(schedule, fragments=1).partition(round)
        assert tuple(map(len, partition.held)) == tuple(map(len, whole.held))
        assert all(partition.holders(block) for block in range(schedule.blocks))


@given(schedules())
def test_from_round_to_round_only_blocks_of_the_fragment_that_is_synced_move(schedule):
    for round in range(13):
        before, after = schedule.partition(round), schedule.partition(round + 1)
        fragment, plan = schedule.fragment(round), schedule.plan(round)
        covered = {*plan.averaged, *plan.owner}
        for block in range(schedule.blocks):
            if fragment is None or fragment_of_block(block, schedule.fragments) == fragment:
                assert block in covered
            else:
                assert block not in covered
                assert before.holders(block) == after.holders(block)


@given(schedules())
def test_without_a_change_of_counts_each_fragment_is_synced_every_nth_round(schedule):
    schedule = replace(schedule, warmup_rounds=0, stages=(), finish_from=None)
    count = schedule.fragments
    assert [schedule.fragment(round) for round in range(2 * count)] == (
        [None] * 2 if count == 1 else [*range(count), *range(count)]
    )


@given(schedules())
def test_the_coming_plan_has_each_block_s_owner_at_its_next_sync(schedule):
    for round in range(8):
        coming = schedule.coming_plan(None, round)
        assert sorted([*coming.averaged, *coming.owner]) == list(range(schedule.blocks))
        for block, owner in coming.owner.items():
            following = round
            while block not in {*schedule.plan(following).averaged, *schedule.plan(following).owner}:
                following += 1
            assert schedule.plan(following).owner[block] == owner


def test_every_block_comes_to_every_worker():
    schedule = Schedule(8, 2, 2, seed=0, fragments=4)
    seen = {
        (worker, block)
        for round in range(60)
        for worker, held in enumerate(schedule.partition(round).held)
        for block in held
    }
    assert len(seen) == 2 * 8
    moves = [before != after for before, after in pairwise(schedule.partition(round).held for round in range(60))]
    assert 15 < sum(moves) < 45  # with two blocks on two workers every other draw changes nothing


@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_the_parts_of_a_plan_are_the_plan(fragments):
    schedule = Schedule(9, 3, 4, seed=1)
    plan = plan_sync(schedule.partition(0), schedule.partition(1))
    parts = [plan_of_fragment(plan, fragment, fragments) for fragment in range(fragments)]
    for name in ("averaged", "owner", "merge", "hand_over"):
        assert sorted(each for part in parts for each in getattr(part, name)) == sorted(getattr(plan, name))
    assert all(part.owner.items() <= plan.owner.items() for part in parts)


@given(st.dictionaries(st.from_regex(r"[a-c]\.[x-z]\.[vw]", fullmatch=True), st.integers(0, 1000)), st.integers(1, 5))
def test_modules_are_spread_by_size_and_never_cut(sizes, fragments):
    found = spread(sizes, fragments)
    assert found.keys() == sizes.keys()
    modules: dict[str, set[int]] = {}
    totals, bytes_of = [0] * fragments, {}
    for name, fragment in found.items():
        module = name.rpartition(".")[0]
        modules.setdefault(module, set()).add(fragment)
        bytes_of[module] = bytes_of.get(module, 0) + sizes[name]
        totals[fragment] += sizes[name]
    assert all(len(of_module) == 1 for of_module in modules.values())
    assert max(totals) - min(totals) <= max(bytes_of.values(), default=0)

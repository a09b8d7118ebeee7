"""The overlap that follows from measured times: by hand, and through a checkpoint."""

from __future__ import annotations

import json
import re
from functools import reduce

import pytest

from resist_lightning.schedule.overlap import ALL_WAIT, Overlaps, choose_overlap, overlap_of_blocks

AUTO = Overlaps(0, round_steps=50, workers=2)
ROWS = {
    0: ([0.9, 0.9], [0.0, 0.0]),  # there was no sync before the first round
    1: ([0.5, 0.25], [9.0, 9.0]),
    2: ([0.6, 0.2], [3.0, 2.0]),
    3: ([0.1, 0.1], [0.1, 0.1]),
}


def learn_all(overlaps, rounds, rows=ROWS):
    return reduce(lambda known, round: known.learn(round, *rows[round]), rounds, overlaps)


@pytest.mark.parametrize(
    ("steps", "syncs", "round_steps", "overlap"),
    [
        ([0.5, 0.5], [7.0, 6.0], 50, 17),  # 1.2 x 7 s / 0.5 s
        ([1.0, 0.5], [2.0, 2.5], 50, 6),  # the slowest sync beside the fastest worker: exactly six steps
        ([0.5, 0.5], [7.0, 7.0], 10, 9),  # a step must come before the border
        ([0.5, 0.5], [0.73, 0.73], 5, 2),
        ([0.5, 0.5], [0.01, 0.01], 2, 1),
        ([0.5, 0.5], [0.249, 0.249], 50, 0),  # below a hundredth of a round of 25 s
        ([0.5, 0.5], [0.251, 0.251], 50, 1),
        ([0.1, 0.5], [0.249, 0.249], 50, 0),  # a round takes as long as the slowest worker does
    ],
)
def test_as_many_steps_of_the_fastest_worker_as_the_slowest_sync_takes(steps, syncs, round_steps, overlap):
    assert choose_overlap(steps, syncs, round_steps) == overlap


def test_three_rounds_wait_and_of_two_measurements_the_shorter_one_counts():
    for last in range(3):
        known = learn_all(AUTO, range(last))
        assert known.chosen is None
        assert [known.of_round(round) for round in (0, 3, 99)] == [0, 0, 0]
        assert (known.summary(), known.in_words()) == (None, "")
    chosen = learn_all(AUTO, range(3))
    assert [chosen.of_round(round) for round in (0, 2, 3, 99)] == [0, 0, 18, 18]  # 1.2 x 3 s / 0.2 s
    assert learn_all(chosen, [3]) == chosen
    assert chosen.summary() == {
        "from_round": 3,
        "local_steps": 18,
        "fastest_step_seconds": 0.2,
        "slowest_sync_seconds": 3.0,
    }
    assert chosen.in_words() == (
        "overlap=18 is chosen, from round 3 on: a sync takes 3 s, and a local step of the fastest worker 0.2 s."
    )


@pytest.mark.parametrize(
    ("overlap", "shared", "blocks", "late"),
    [(10, 60, 40, 3), (10, 0, 40, 10), (10, 60, 0, 0), (1, 60, 40, 1), (0, 60, 40, 0), (7, 0, 0, 0)],
)
def test_blocks_are_under_way_for_their_share_of_the_bytes(overlap, shared, blocks, late):
    assert overlap_of_blocks(overlap, shared, blocks) == late


def test_two_syncs_of_each_fragment_are_measured_and_the_longest_fragment_counts():
    rows = {0: ROWS[0], **{number: ([0.5, 0.5], [sync, sync]) for number, sync in enumerate((4.0, 9.0, 5.0, 7.0), 1)}}
    auto = Overlaps(0, round_steps=50, workers=2, fragments=2)
    assert learn_all(auto, range(4), rows).chosen is None
    chosen = learn_all(auto, range(5), rows)
    assert chosen.chosen == (5, 17)  # 1.2 x 7 s / 0.5 s: fragments took 4 s and 5 s, 9 s and 7 s
    assert auto.resumed(chosen.state_dict(), 5) == chosen
    assert AUTO.resumed(chosen.state_dict(), 5).chosen is None


@pytest.mark.parametrize(
    ("overlaps", "rows", "words"),
    [
        (Overlaps(0, 9, 2), ROWS, "overlap=8 is chosen, .* The sync needs 18, so choose longer rounds, or fewer bits"),
        (Overlaps(0, 19, 2), ROWS, r"overlap=18 is chosen, .* 0\.2 s\.$"),
        (AUTO, {**ROWS, 2: ([0.5, 0.5], [0.02, 0.02])}, "overlap=0 is chosen: .* less than 1% of a round"),
    ],
)
def test_the_reason_is_said(overlaps, rows, words):
    assert re.match(words, learn_all(overlaps, range(3), rows).in_words())


def test_measuring_waits_for_the_warm_up_and_leaves_out_rounds_without_a_sync_before_them():
    warm = Overlaps(0, 50, 2, measured_from=1)
    assert learn_all(warm, range(2)) == warm
    assert learn_all(warm, range(1, 4)).chosen == (4, 2)  # 1.2 x 0.1 s / 0.1 s
    resumed = learn_all(AUTO, [1, 0, 2])  # resumed in the second round, without the time of the sync before it
    assert resumed.chosen == (3, 18)
    assert len(learn_all(AUTO, [1, 0]).seconds) == 1


@pytest.mark.parametrize("stop", range(5))
def test_what_was_saved_and_read_goes_on_as_if_nothing_had_happened(stop):
    saved = json.loads(json.dumps(learn_all(AUTO, range(stop)).state_dict()))
    resumed = AUTO.resumed(saved, stop)
    assert resumed == learn_all(AUTO, range(stop))
    assert learn_all(resumed, range(stop, 4)) == learn_all(AUTO, range(4))


@pytest.mark.parametrize(
    ("overlaps", "state"),
    [(AUTO, {}), (Overlaps(0, 50, 3), None), (Overlaps(0, 40, 2), None)],
    ids=["a run that waited", "other workers", "other rounds"],
)
def test_what_was_measured_elsewhere_is_measured_again(overlaps, state):
    saved = learn_all(AUTO, range(4)).state_dict() if state is None else state
    resumed = overlaps.resumed(saved, 7)
    assert (resumed.chosen, resumed.seconds, resumed.measured_from) == (None, (), 7)


def test_a_number_is_the_overlap_of_all_rounds_and_leaves_nothing_in_a_checkpoint():
    given = Overlaps(3)
    assert [given.of_round(round) for round in (0, 9)] == [3, 3]
    assert learn_all(given, range(4)) == given == given.resumed(learn_all(AUTO, range(4)).state_dict(), 4)
    assert given.state_dict() == ALL_WAIT.state_dict() == {}
    assert (given.summary(), given.in_words(), given.unused(0, 1)) == (None, "", "")


@pytest.mark.parametrize(
    ("overlaps", "round", "begun", "warned"),
    [
        (AUTO, 0, 3, True),
        (AUTO, 0, 4, False),
        (AUTO, 0, 0, False),
        (Overlaps(0, 50, 2, measured_from=2), 0, 4, True),
        (AUTO, 1, 3, True),
        (AUTO, 1, 4, False),
        (learn_all(AUTO, range(3)), 3, 4, False),
    ],
)
def test_a_training_that_ends_before_the_choice_is_told(overlaps, round, begun, warned):
    text = overlaps.unused(round, begun)
    assert bool(text) == warned
    assert not warned or f"and this training has {begun - round}, so" in text

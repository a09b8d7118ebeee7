"""A host is lost, the others go on without it, and it comes back: real torchruns. The slowest test of the suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.elastic.run import change
from experiments.elastic.script import LOCAL_STEPS
from tests.helpers.programs import run_module


@pytest.mark.timeout(400)
def test_the_others_go_on_without_a_lost_host_and_take_it_in_again(tmp_path: Path) -> None:
    run_module("experiments.elastic.run", "size=smoke", f"out={tmp_path}")
    record = json.loads((tmp_path / "elastic.jsonl").read_text())

    assert (record["lost"]["workers"], record["back"]["workers"]) == (1, 2)
    assert (record["finished"], record["last_step"], record["weights_equal"]) == (2, 80, True)
    assert 0 <= record["lost"]["steps_lost"] <= LOCAL_STEPS
    assert record["back"]["steps_lost"] == 0  # it was admitted at the border of a round
    assert (record["back"]["first_step"] - 1) % LOCAL_STEPS == 0


def test_what_a_change_costs_is_read_from_the_diaries(tmp_path: Path) -> None:
    diaries = {1: [(10, 3, 1), (12, 3, 6)], 2: [(10, 3, 1), (13, 3, 7)], 3: [(20, 2, 6), (30, 2, 9)], 4: [(21, 2, 6)]}
    for pid, rows in diaries.items():
        lines = [json.dumps({"at": at, "workers": workers, "step": step}) for at, workers, step in rows]
        (tmp_path / f"diary-{pid}.jsonl").write_text("\n".join(lines) + '\n{"at": 4')

    assert change(tmp_path, 14.0, 2) == {
        "workers": 2,
        "seconds_until_training": 7.0,
        "seconds_without_training": 7.0,
        "steps_lost": 2,
        "first_step": 6,
        "local_steps": LOCAL_STEPS,
    }

"""The benchmarks of `run.py`: every study runs in its smoke size, and its record has the fields of the tables."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks import tables
from experiments.benchmarks.heartbeats import operations_per_beat
from experiments.harness.record import read_record
from tests.helpers.programs import run_module


def test_every_study_is_measured_and_has_its_table(tmp_path: Path) -> None:
    output = run_module("experiments.benchmarks.run", "size=smoke", f"out={tmp_path}")

    names = ["check_cost", "held_memory_2", "overhead", "policies_digits", "speech_shaped", "step_time", "wires"]
    found = {path.stem: read_record(path) for path in sorted(tmp_path.iterdir())}
    assert list(found) == names
    for name in set(names) & tables.STUDIES.keys():
        (make,) = tables.STUDIES[name]
        assert make(found[name]).title in output
    held = found["held_memory_2"]["worst_bytes_by_worker"]
    assert len(held) == 2
    full = found["held_memory_2"]["full_bytes"]
    assert all(0 < worker["bound"] < full and 0.9 < worker["held"] / worker["bound"] < 1.01 for worker in held)
    assert len(found["policies_digits"]["rows"]) == 3 * 9
    assert all(0 <= accuracy <= 100 for row in found["policies_digits"]["rows"] for accuracy in row["test_accuracy"])
    assert found["step_time"]["ratio"] > 0
    sent = {row["wire"]: row["sent_bytes"] for row in found["wires"]["rows"]}
    assert 0.25 < sent["int8"] / sent["fp32"] < 0.28


def test_the_store_is_asked_in_proportion_to_the_number_of_workers() -> None:
    assert operations_per_beat(2) == {"requests": 6, "keys": 10}
    for workers in (64, 1000, 4096):
        assert operations_per_beat(workers) == {"requests": 2 * workers + 2, "keys": 5 * workers}

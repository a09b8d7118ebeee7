"""The benchmark of memory by phase: its smoke size runs, and only the first worker has the whole network."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks import tables
from experiments.harness.record import read_record
from tests.helpers.programs import run_module


def test_every_phase_has_its_peaks(tmp_path: Path) -> None:
    # So wide that a block is more than what Python and torch make besides.
    told = run_module("experiments.benchmarks.phases", "size=smoke", "width=256", "blocks=6", f"out={tmp_path}")

    content = read_record(tmp_path / "held_phases.jsonl")
    rows = content["rows"]
    assert [(row["worker"], row["bound"] < 3 * content["full_bytes"]) for row in rows] == [(0, True), (1, True)]
    for row in rows:
        assert all(row[phase]["allocated"] > 0 for phase in tables.PHASES)
    # Half of the blocks: with those of all others the second worker would be above this.
    part = rows[1]["bound"] / 3
    assert part < rows[1]["start"]["allocated"] < content["full_bytes"] <= rows[0]["start"]["allocated"]
    assert rows[1]["end"]["allocated"] < rows[0]["end"]["allocated"]
    assert "Most bytes of tensors by phase" in told
    assert (tmp_path / "held_phases.png").exists()

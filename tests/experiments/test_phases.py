"""Memory by phase: what no phase of a worker's life may exceed, and that the benchmark writes it down."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks import tables
from experiments.harness.record import read_record
from tests.helpers.programs import run_module

WIDTH, BLOCKS, WORKERS = 512, 8, 4
BLOCK = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH)
SHARED = 4 * (8 * WIDTH * WIDTH + WIDTH + 10 * WIDTH + 10)
PART = SHARED + BLOCKS // WORKERS * BLOCK
NOISE = 3_500_000  # gloo's buffers of an all-reduce (2 MiB), and Python's objects; less than a block

# Weights, gradients and momentum, and a message beside them. With Lightning there are no gradients in an evaluation.
MOST = {
    "start": PART + SHARED,
    "training": 3 * PART,
    "sync": 3 * PART,
    "evaluation": 2 * PART + BLOCK,
    "checkpoint": 3 * PART + BLOCK,
    "end": 3 * PART + BLOCK,
    "resume": 2 * PART,
}


def test_in_no_phase_does_a_worker_hold_more_than_its_part_and_a_message(tmp_path: Path) -> None:
    sizes = f"width={WIDTH}", f"blocks={BLOCKS}", f"workers=[{WORKERS}]"
    told = run_module("experiments.benchmarks.phases", "size=smoke", *sizes, f"out={tmp_path}")

    content = read_record(tmp_path / "held_phases.jsonl")
    full = content["full_bytes"]
    assert full == SHARED + BLOCKS * BLOCK
    first, *others = content["rows"]
    assert len(others) == WORKERS - 1
    for row in others:
        assert row["bound"] == 3 * PART
        assert row["stated"] == MOST
        for phase in tables.PHASES:
            # A part less would be a phase that was not measured.
            assert PART < row[phase]["allocated"] <= MOST[phase] + NOISE, phase
    # The first one may hold all weights, once, beside what it trains with.
    for phase in tables.PHASES:
        assert PART < first[phase]["allocated"] <= 3 * PART + full + PART + NOISE, phase
    assert first["start"]["allocated"] > full
    assert "Most bytes of tensors by phase" in told
    assert (tmp_path / "held_phases.png").exists()

"""Memory by phase: limits for each phase of a worker's life, and the benchmark's record of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from experiments.benchmarks import tables
from experiments.harness.memory_limit import MemoryGroup, available, memory_groups
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
            # With less than a part the phase would not have been measured.
            assert PART < row[phase]["allocated"] <= MOST[phase] + NOISE, phase
    # Worker 0 may also hold all weights, once.
    for phase in tables.PHASES:
        assert PART < first[phase]["allocated"] <= 3 * PART + full + PART + NOISE, phase
    assert first["start"]["allocated"] > full
    assert "Most bytes of tensors by phase" in told
    assert (tmp_path / "held_phases.png").exists()


def take_in_group(group: MemoryGroup, megabytes: int) -> None:
    group.join()
    bytearray(megabytes << 20)


@pytest.mark.skipif(not available(), reason="needs root, and control groups of version 1")
def test_the_kernel_kills_who_exceeds_a_limit() -> None:
    fork = multiprocessing.get_context("fork")
    codes = []
    with memory_groups([30 << 20] * 2) as groups:
        for group, megabytes in zip(groups, (5, 60), strict=True):
            worker = fork.Process(target=take_in_group, args=(group, megabytes))
            worker.start()
            worker.join()
            codes.append(worker.exitcode)
    assert codes == [0, -signal.SIGKILL]
    assert not list(Path("/sys/fs/cgroup/memory").glob(f"resist_{os.getpid()}_*"))


@pytest.mark.skipif(not available(), reason="needs root, and control groups of version 1")
def test_workers_train_under_a_limit(tmp_path: Path) -> None:
    run_module("experiments.benchmarks.limited", "size=smoke", f"out={tmp_path}")
    (row,) = read_record(tmp_path / "limited.jsonl")["rows"]
    assert row["method"] == "resist_late"
    assert "killed" not in row

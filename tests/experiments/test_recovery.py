"""The benchmark of snapshots and checkpoints: its smoke size runs, and its record lists the files on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.harness.record import read_record
from tests.helpers.programs import run_module


def sizes(folder: Path, pattern: str) -> list[int]:
    return [file.stat().st_size for file in sorted(folder.glob(pattern))]


def test_the_record_says_what_lies_on_the_disk(tmp_path: Path) -> None:
    files, output = tmp_path / "files", tmp_path / "output"

    told = run_module("experiments.benchmarks.recovery", "size=smoke", f"out={output}", f"files={files}")

    content = read_record(output / "recovery.jsonl")
    for every in ("1", "2"):
        snapshot = content["snapshots"][every]
        assert len(snapshot["bytes_by_worker"]) == 2
        assert snapshot["bytes_by_worker"] == sizes(files / f"kept-{every}", "*/worker-*.pt")
        steps = int(every) * 50 * content["snapshots"]["median_step_seconds"]
        assert snapshot["share_of_training"] == pytest.approx(snapshot["median_write_seconds"] / steps)
    assert content["snapshots"]["1"]["snapshots"] == 3
    assert content["snapshots"]["2"]["snapshots"] == 2
    for name, workers in (("resist", 2), ("ddp", 0)):
        saved = content["checkpoints"][name]
        assert [saved["bytes"]] == sizes(files / name, "*.ckpt")
        assert saved["bytes_by_worker"] == sizes(files / name, "*.ckpt.workers/*.pt")
        assert len(saved["bytes_by_worker"]) == workers
    assert len(content["resumes"]["seconds"]) == 5
    assert content["added"]["seconds"].keys() == {"neither", "watch", "notes", "both"}
    assert all(len(turns) == 1 for turns in content["added"]["seconds"].values())
    assert "checkpoint in mid-round" in told

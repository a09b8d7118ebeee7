"""The benchmark of the cost of an evaluation: its smoke size runs, where all workers, worker 0 or none evaluate."""

from __future__ import annotations

from pathlib import Path

from experiments.harness.record import read_record
from tests.helpers.programs import run_module


def test_every_way_to_evaluate_is_measured(tmp_path: Path) -> None:
    # Enough images that their evaluation dominates the time.
    told = run_module("experiments.benchmarks.evaluations", "size=smoke", "examples=256", f"out={tmp_path}")

    rows = {row["way"]: row for row in read_record(tmp_path / "evaluations.jsonl")["rows"]}
    assert [len(worker) for worker in rows["none"]["evaluated"]] == [0, 0]
    (first,), (other,) = rows["all"]["evaluated"]
    assert 0.5 < first / other < 2
    (first,), (other,) = rows["first"]["evaluated"]
    assert first > 2 * other
    ((evaluator,),) = rows["evaluator"]["evaluated"]
    assert evaluator > 0
    assert rows["first"]["seconds"] > rows["none"]["seconds"] > 0
    assert "lost per evaluation" in told

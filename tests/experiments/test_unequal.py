"""The experiment with a slow worker: it runs, cleans up after itself, and its table shows the measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.harness.record import read_record
from experiments.unequal.quota import ROOT as CGROUPS
from experiments.unequal.quota import why_no_quota
from tests.helpers.programs import run_module

MISSING = why_no_quota()


@pytest.mark.skipif(bool(MISSING), reason=f"no CPU quota: {MISSING}")
def test_both_settings_train_beside_a_slow_worker(tmp_path: Path) -> None:
    output = run_module("experiments.unequal.run", "size=smoke", f"out={tmp_path}")

    assert "wrote" in output
    assert not [path for path in [*CGROUPS.glob("unequal_*"), *CGROUPS.glob("cpu/unequal_*")] if path.is_dir()]
    assert (tmp_path / "unequal.png").stat().st_size > 10_000
    content = read_record(tmp_path / "unequal_2.jsonl")
    equal, auto = content["rows"]
    assert (equal["shares"], equal["blocks"], equal["table"]) == ("equal", [4, 4], {})
    assert auto["shares"] == "auto"
    assert sum(auto["blocks"]) == 8
    assert auto["table"]["counts"] == [[6, auto["blocks"]]]
    assert len(equal["round_seconds"]) == len(auto["round_seconds"]) == 2
    assert all(len(row["step_seconds"]) == 2 for row in content["rows"])
    assert auto["predicted"] >= 1

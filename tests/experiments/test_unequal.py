"""The experiment with a slow worker: it runs, cleans up after itself, and its table says what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.harness.record import read_record
from experiments.unequal import run, tables
from experiments.unequal.quota import ROOT as CGROUPS
from experiments.unequal.quota import why_no_quota
from tests.helpers.programs import ROOT, run_program

MISSING = why_no_quota()


@pytest.mark.skipif(bool(MISSING), reason=f"no CPU quota: {MISSING}")
def test_both_settings_train_beside_a_slow_worker(tmp_path: Path) -> None:
    output = run_program(["experiments/unequal/run.py", "--smoke", "--output", str(tmp_path)], ROOT, timeout=200)

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


def training(shares: str, blocks: int, seconds: list[float], costs: list[dict[str, float]]) -> dict[str, Any]:
    rounds = [{"seconds": value, "step_seconds": value / 10, "blocks": blocks} for value in seconds]
    return {"shares": shares, "rounds": rounds, "table": {}, "costs": costs}


def test_the_table_compares_the_slowest_workers_of_each_turn() -> None:
    settings = {"workers": 2, "cores": [0.6, 0.2], "sections": [1, 1, 7, 1], "min_blocks": 1}
    costs = [{"shared": 1.0, "block": 1.0}, {"shared": 3.0, "block": 3.0}]
    fast = [training("equal", 3, [4.0, 4.1], []), training("auto", 5, [6.0, 6.1], costs)]
    slow = [training("equal", 3, [12.0, 12.4], []), training("auto", 1, [6.1, 6.0], costs)]
    content = {"settings": settings, "rows": run.rows_of(settings, [fast, slow])}

    assert [row["blocks"] for row in content["rows"]] == [[3, 3], [5, 1]]
    assert content["rows"][1]["round_seconds"] == [6.1, 6.1]
    assert content["rows"][1]["predicted"] == pytest.approx(12 / 6)
    assert content["rows"][1]["bound"] == pytest.approx(12 / 6)
    assert tables.ratios(content) == [pytest.approx(2.0)]
    assert "| 2: 0.6, 0.2 | 3, 3 | 5, 1 | 12.20 | 6.10 | 2.00x (2.00) | 2.00x | 2.00x |" in tables.table([content])

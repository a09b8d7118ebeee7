"""Time to accuracy: the clock stands while the full model is evaluated, and the table says who was first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.harness.links.namespaces import namespaces_in_use, why_no_namespaces
from experiments.harness.record import read_record
from experiments.harness.settings import ConfigError
from experiments.links import options
from experiments.time_to_accuracy import run, tables, worker
from tests.helpers.programs import ROOT, run_program

MISSING = why_no_namespaces()


@pytest.mark.skipif(bool(MISSING), reason=f"no network namespaces: {MISSING}")
def test_both_methods_train_on_equal_samples(tmp_path: Path) -> None:
    before = namespaces_in_use()
    output = run_program(["experiments/time_to_accuracy/run.py", "size=smoke", f"output={tmp_path}"], ROOT)

    assert "wrote" in output
    assert namespaces_in_use() == before
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 10_000
    rows = read_record(tmp_path / "time_to_accuracy.jsonl")["rows"]
    assert [row["method"] for row in rows] == ["ddp", "resist"]
    for row in rows:
        assert row["steps"] == [4, 8]
        assert 0 < row["seconds"][0] < row["seconds"][1]
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracy"])
        assert 0 < row["kernel_sent_bytes"][0] < row["kernel_sent_bytes"][1]
    assert rows[1]["kernel_sent_bytes"][1] < rows[0]["kernel_sent_bytes"][1] / 2


def test_the_clock_stands_from_validation_to_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 100.0, 104.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(now))
    synced: list[float] = []

    class Place:
        def ready(self) -> None:
            pass

        def bytes(self) -> None:
            return None

    engine = SimpleNamespace(sync_if_due=lambda: synced.append(1))
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(engine=engine), global_step=5, callback_metrics={"val/acc": 0.5}
    )
    watch, module = worker.Stopwatch(Place()), None
    for _ in range(2):
        watch.on_train_batch_start(trainer, module, None, 0)
        watch.on_train_batch_start(trainer, module, None, 1)
        watch.on_validation_start(trainer, module)
        watch.on_validation_end(trainer, module)

    assert [point["seconds"] for point in watch.curve] == [3.0, 7.0]
    assert len(synced) == 2


def rows() -> list[dict[str, Any]]:
    common = {"bandwidth_gbit": 0.1, "kernel_sent_bytes": [1e6, 2e6]}
    return [
        {"method": "ddp", "seconds": [10.0, 20.0], "accuracy": [0.3, 0.45], **common},
        {"method": "resist_int8", "seconds": [2.0, 4.0], "accuracy": [0.42, 0.41], **common},
    ]


def test_the_goal_is_what_all_reached() -> None:
    assert tables.target(rows()) == 0.42
    assert tables.reached(rows()[1], 0.42) == 2.0
    assert tables.reached(rows()[1], 0.43) is None
    assert tables.header(rows())[5] == "seconds to 42%"
    assert tables.cells(rows())[1][1:] == ["ResIST, int8", "4.0", "2.0 MB", "41.0 %", "2.0", "10.00x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["size=full"], "folder"),
        (["folder=/no/such/folder"], "'/no/such/folder' is not a folder"),
        (["methods=[none]"], "'none' does not train one model"),
        (["steps=9"], "steps=9 must be a multiple of evaluate_every=4"),
        (["batch=150"], "batch=150 for 2 workers is above the 196 training examples"),
        (["lr=0"], "lr=0: must be a number, above 0"),
    ],
)
def test_bad_values_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        run.check(options.composed(run.CONFIG, "time_to_accuracy", run.Options, ["size=smoke", *arguments][-2:]))
    assert message in str(raised.value)

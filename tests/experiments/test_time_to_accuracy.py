"""Time to accuracy: the clock stops while the full model is evaluated, and the table names the first method."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.harness import cli
from experiments.harness.links.namespaces import namespaces_in_use
from experiments.harness.record import read_record
from experiments.harness.settings import ConfigError
from experiments.time_to_accuracy import worker
from experiments.time_to_accuracy.run import Options
from tests.helpers.namespaces import needs_namespaces
from tests.helpers.programs import run_module


@needs_namespaces
def test_both_methods_train_on_equal_samples(tmp_path: Path) -> None:
    before = namespaces_in_use()
    output = run_module("experiments.time_to_accuracy.run", "size=smoke", f"out={tmp_path}")

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["size=full"], "folder"),
        (["folder=/no/such/folder"], "'/no/such/folder' is not a folder"),
        (["methods=[none]"], "'none' does not train one model"),
        (["steps=9"], "steps=9 must be a multiple of evaluate_every=4"),
        (["batch=150"], "batch=150 for 2 workers exceeds the 196 training examples"),
    ],
)
def test_bad_values_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cli.read(["size=smoke", *arguments][-2:], Options)
    assert message in str(raised.value)

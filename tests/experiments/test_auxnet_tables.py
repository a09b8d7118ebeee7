"""The tables and pictures of AuxNet's experiments, from rows made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.app.timeline_figure import draw_timeline, shares
from experiments.auxnet import sweep_tables, tables
from experiments.auxnet.cases import SWEEP_SEED, base

MACHINE = {"cores": 2, "processor": "x", "torch": "2"}


def row(method: str, workers: int, seed: int, last: float, seconds: float, **changed: Any) -> dict[str, Any]:
    case = replace(base("digits", method, workers, seed), **changed)
    boundaries = workers - 1
    return {
        "case": case.key, "last": last, "last_holdout": last - 1, "running": last - 9, "aux_fed": last + 2,
        "mismatch": [0.25] * boundaries, "predicted": 1.5, "step_seconds": seconds, "data_seconds": 0.0,
        "training_seconds": 100 * seconds, "steps_per_epoch": 10, "steps": 100, "held_bytes": [12] * workers,
        "held_by_formula": [12] * workers, "stored_bytes": [0] * workers, "parameters": [500] * workers,
        "sent_by_step": [None if method in ("serial", "pipeline") else 8.0] * workers, "sent_by_formula": [8] * workers,
    }  # fmt: skip


ROWS = [
    row("serial", 1, 0, 90.0, 0.2), row("serial", 1, 1, 94.0, 0.2), row("serial", 1, 0, 80.0, 0.1, augment=False),
    row("penalty", 2, 0, 89.0, 0.1), row("penalty", 2, 1, 91.0, 0.1), row("penalty", 3, 0, 70.0, 0.4),
    row("penalty-store", 2, 0, 81.0, 0.1), row("pipeline", 2, 0, 92.0, 0.16, schedule="gpipe", micro_batches=4),
]  # fmt: skip
CONTENT = {"machine": MACHINE, "settings": {"size": "full", "steps": 30}, "rows": ROWS}


def test_a_method_stands_beside_the_process_with_its_own_augmentation() -> None:
    found = tables.accuracy(CONTENT).rows
    assert found[0] == ["digits", "one process", "1", "yes", "92.00 ± 2.00", "-", "2"]
    assert found[2] == ["digits", "AuxNet, penalty", "2", "yes", "90.00 ± 1.00", "-2.00", "2"]
    assert found[4][1:6] == ["penalty, stored guesses", "2", "no", "81.00", "+1.00"]
    assert [line[5] for line in found] == ["-", "-", "-2.00", "-20.00", "+1.00", "+2.00"]


def test_speed_ups_are_over_the_process_and_too_many_workers_are_marked() -> None:
    found = tables.speed(CONTENT).rows
    assert found[2][2:] == ["2", "yes", "1.00", "2.00", "1.50", "10.0"]
    assert found[3][2] == "3 (oversubscribed)"
    assert found[4][5] == "1.00"  # stored guesses: against one process without augmentation
    assert found[5][5:7] == ["1.25", "1.60"]  # a pipeline of two stages and four micro-batches


def test_bytes_and_explanation() -> None:
    sizes = tables.sizes(CONTENT).rows
    assert sizes[0] == ["digits", "one process", "1", "500", "12 B", "12 B", "-", "-", "-"]
    assert sizes[1][3:] == ["1,000", "12 B", "12 B", "-", "8 B", "8 B"]
    found = tables.explanation(CONTENT).rows
    assert found[0] == ["digits", "AuxNet, penalty", "2", "90.00 ± 1.00", "81.00 ± 1.00", "92.00 ± 1.00", "0.25", "2"]
    assert found[1][6] == "0.25, 0.25"
    assert len(found) == 3


def test_the_sweep_shows_the_holdout_by_one_setting() -> None:
    rows = [row("penalty", 2, SWEEP_SEED, value, 1, beta=beta) for beta, value in ((0.1, 50.0), (1.0, 60.0))]
    rows += [
        row("penalty", 2, SWEEP_SEED, 70.0, 1, aux_width=8),
        row("penalty", 2, SWEEP_SEED, 40.0, 1, warmup_steps=0),
        row("penalty", 3, SWEEP_SEED, 33.0, 1, lambda_step=0.3),
        row("penalty", 3, SWEEP_SEED, 32.0, 1, lambda_step=0.1),
        row("hybrid", 2, SWEEP_SEED, 65.0, 1, serial_every=2),
        row("hybrid", 2, SWEEP_SEED, 63.0, 1, serial_every=8),
    ]
    rows += [row("al-net", 2, SWEEP_SEED, 30.0, 1)]
    content = {**CONTENT, "rows": rows}
    width = base("digits", "penalty", 2, 0).aux_width
    assert tables.betas(content).rows == [["digits", "8", "-", "69.00"], ["digits", str(width), "49.00", "59.00"]]
    assert tables.warmups(content).rows == [["digits", "39.00", "59.00"]]
    assert tables.betas_of_others(content).rows == [["digits", "AuxNet, augmented Lagrangian", "29.00"]]
    assert sweep_tables.lambda_steps(content).header == ["task", "c = 0.1", "c = 0.3"]
    assert sweep_tables.lambda_steps(content).rows == [["digits", "31.00", "32.00"]]
    assert sweep_tables.hybrids(content).header[1:] == ["never", "every 8 steps", "every 2 steps"]
    assert sweep_tables.hybrids(content).rows == [["digits", "59.00", "62.00", "64.00"]]


def test_a_study_that_was_not_made_says_so(tmp_path: Path) -> None:
    assert tables.read("accuracy", tmp_path) is None
    assert "16, 32, 64" in tables.conditions(CONTENT)
    assert "behind section2.2" in tables.conditions(CONTENT)


TIMELINE = [
    [("forward", 0.0, 4.0), ("wait for output", 4.0, 6.0), ("backward", 6.0, 10.0)],
    [("aux forward", 1.0, 2.0), ("forward", 2.0, 6.0), ("backward", 6.0, 11.0)],
]


def test_a_timeline_shows_what_was_measured(tmp_path: Path) -> None:
    assert shares(TIMELINE) == pytest.approx([0.8, 1.0])
    with Image.open(draw_timeline(tmp_path / "t.png", TIMELINE)) as image:
        counted = {colour: n for n, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}  # type: ignore[union-attr]
    waiting, forward, backward, guess = ((227, 227, 227), (86, 180, 233), (0, 114, 178), (204, 121, 167))
    assert counted[backward] / counted[waiting] == pytest.approx(9 / 2, rel=0.25)
    assert counted[forward] / counted[guess] == pytest.approx(8, rel=0.25)

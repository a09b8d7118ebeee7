"""The report of a run, from small files written by hand: every number is computed here by other means."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from experiments.app.results import Curve, read_curves
from experiments.app.run_figures import smoothed
from experiments.harness.words import bytes_in_words, seconds_in_words
from experiments.report import main, report
from tests.helpers.programs import refusal

RUN = {
    "strategy": "resist", "workers": 2, "seed": 0, "full_parameters": 1000, "gradient_bytes": 1800,
    "wall_seconds": 95.0, "checkpoint": "best.ckpt", "test": {"accuracy": 0.975, "loss": 0.125}, "overrides": [],
    "made_with": {},
}  # fmt: skip
SUMMARY = {
    "strategy": "resist", "workers": 2, "rounds": 3, "local_steps": 25, "local_steps_per_round": 10,
    "blocks": ["net.section3.1", "net.section3.2", "net.section3.3"],
    "shared_parameters": 700, "full_parameters": 1000, "held_parameters": [800, 900],
    "held_parameters_max": 900, "scale": 0.5,
    "seconds": {"training": 8.0, "sync": 2.0, "observe": 1.0},
    "sent_bytes": {
        "shared": [4000, 4000], "hand_over": [1000, 3000], "merge": [0, 0], "state": [0, 0],
        "evaluation": [500, 700], "checkpoint": [0, 0], "start": [40, 0], "control": [8, 8],
    },
    "ddp_bytes": 300_000, "local_sgd_bytes": 12_000,
    "partitions": [[[0], [1, 2]], [[0, 1], [2]], [[0, 1, 2], [0]]],
    "sent_by_round": [[10, 2000], [20, 5000]],
}  # fmt: skip
CLOCK = {"processes": 2, "steps": 25, "epochs": 5, "training_seconds": 9.0, "validation_seconds": 3.0}
METRICS = """step,train/loss,val/loss,val/acc,lr-SGD
4,2.0,,,0.1
9,1.0,,,0.1
9,,1.5,0.5,
14,0.5,,,0.01
24,0.25,,,0.01
24,,0.5,0.75,
"""


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a run with rounds, its results, and the report's output."""
    folder = tmp_path_factory.mktemp("report")
    write(folder, RUN, SUMMARY, METRICS)
    return folder, *reported(folder)


def write(folder: Path, run: Any, summary: Any = None, metrics: str = "") -> None:
    """Write the files of a run; without metrics no curves are drawn."""
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "clock.json").write_text(json.dumps(CLOCK))
    if metrics:
        (folder / "csv").mkdir()
        (folder / "csv" / "metrics.csv").write_text(metrics)
    if summary:
        (folder / "resist_summary.json").write_text(json.dumps(summary))


def reported(folder: Path) -> tuple[dict[str, Any], str]:
    screen = io.StringIO()
    results = report(folder, Console(file=screen, width=140))
    return results, screen.getvalue()


def test_the_numbers_of_a_run_with_rounds(usual: tuple[Path, dict[str, Any], str]) -> None:
    results = usual[1]
    assert results["test"]["accuracy"] == 0.975
    assert results["validation"]["best_accuracy"] == 0.75
    assert results["parameters"] == {"full": 1000, "held_by_one_worker": 900, "held_share": 0.9}
    sent = results["sent_bytes"]
    assert sent["training"] == 6000  # (4000 + 1000 + 4000 + 3000) / 2 workers
    assert (sent["ddp_ratio"], sent["local_sgd_ratio"]) == (50.0, 2.0)
    assert sent["by_kind"]["evaluation"] == 600
    assert results["seconds"] == {
        "wall": 95.0, "training": 9.0, "validation": 3.0, "compute": 6.0, "sync": 2.0,
    }  # fmt: skip
    assert (results["local_steps"], results["rounds"], results["epochs"]) == (25, 3, 5)


def test_the_table_shows_them_with_units(usual: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, text = usual
    shown = " ".join(text.replace("│", " ").split())
    for expected in (
        "ResIST, 2 workers, 25 local steps in 3 rounds of 10",
        "test accuracy, full model 97.50% best in validation 75.00%",
        "parameters, full model 1,000",
        "held by one worker, at most 900 90.0% of them",
        "sent by one worker 6 kB shared 4 kB, hand-over 2 kB",
        "local SGD would have sent 12 kB 2 times as much",
        "DDP would have sent 300 kB 50 times as much",
        "time in compute 6.00 s 75.0% of the time in batches",
        "time in sync 2.00 s 25.0% of the time in batches",
        "wall time 95.0 s",
    ):
        assert expected in shown
    assert (folder / "report.txt").read_text().count("97.50%") == 1
    assert json.loads((folder / "results.json").read_text())["test"] == RUN["test"]


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        counted = image.convert("RGB").getcolors(maxcolors=1 << 24)
    return {colour for count, colour in counted if count > 100}  # type: ignore[misc,union-attr]


BLUE, ORANGE, SKY = (0, 114, 178), (230, 159, 0), (86, 180, 233)


def test_the_pictures_are_drawn_in_the_colours_of_their_lines(usual: tuple[Path, dict[str, Any], str]) -> None:
    for name in ("partition.png", "accuracy.png", "bytes.png"):
        assert {BLUE, ORANGE} <= colours(usual[0] / name), name


def test_a_partition_of_one_holder_has_one_colour(tmp_path: Path) -> None:
    write(tmp_path, RUN, {**SUMMARY, "partitions": [[[0, 1, 2], []]], "sent_by_round": []})
    reported(tmp_path)
    with Image.open(tmp_path / "partition.png") as image:
        counts = {colour: count for count, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}  # type: ignore[union-attr]
    assert counts[BLUE] > 20 * counts[ORANGE] > 0  # orange in the legend only


def test_more_workers_and_overlap_are_drawn_too(tmp_path: Path) -> None:
    workers = 8
    held = [[index % 3, (index + 1) % 3] for index in range(workers)]
    sent = {kind: [100] * workers for kind in SUMMARY["sent_bytes"]}  # type: ignore[attr-defined]
    write(
        tmp_path, {**RUN, "workers": workers}, {**SUMMARY, "workers": workers, "partitions": [held], "sent_bytes": sent}
    )
    reported(tmp_path)
    assert len(colours(tmp_path / "partition.png")) > workers


NEURONS = {"layer": "net.1", "width": 4, "shown": [0, 2], "holders": [[0, 0], [0, 1], [1, 1]]}
HIDDEN = {**SUMMARY, "strategy": "ist", "blocks": ["net.1"], "partitions": [["a", "b"]] * 3, "neurons": NEURONS}


def test_neurons_are_drawn_by_holder(tmp_path: Path) -> None:
    write(tmp_path, {**RUN, "strategy": "ist"}, {**HIDDEN, "sent_by_round": []})
    _, text = reported(tmp_path)
    assert text.startswith("IST, 2 workers, 25 local steps in 3 rounds of 10")
    assert "hand-over 2 kB" in text
    with Image.open(tmp_path / "partition.png") as image:
        counts = {colour: count for count, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}  # type: ignore[union-attr]
    assert counts[BLUE] == pytest.approx(counts[ORANGE], rel=0.02)  # three cells each


def test_each_holder_of_neurons_has_its_colour(tmp_path: Path) -> None:
    workers = 8
    holders = [[(number + round) % workers for number in range(16)] for round in range(5)]
    neurons = {**NEURONS, "width": 16, "shown": list(range(16)), "holders": holders}
    sent = {kind: [100] * workers for kind in SUMMARY["sent_bytes"]}  # type: ignore[attr-defined]
    run = {**RUN, "strategy": "ist", "workers": workers}
    summary = {**HIDDEN, "workers": workers, "neurons": neurons, "sent_bytes": sent, "sent_by_round": []}
    write(tmp_path, run, summary)
    reported(tmp_path)
    assert len(colours(tmp_path / "partition.png")) > workers


TIMELINE = [[["forward", 0.0, 0.6], ["backward", 0.6, 1.0]], [["aux forward", 0.0, 0.2], ["forward", 0.2, 1.0]]]
STAGES = {
    **SUMMARY, "strategy": "auxnet", "blocks": ["from the input to net.a", "from behind net.a to the output"],
    "sent_bytes": {"boundary": [4000, 4000], "output": [0, 200], "start": [40, 0]},
    "method": {
        "guess_bytes": [0, 5000], "timeline": TIMELINE,
        "rounds": [[0, {"auxnet/mismatch_1": 0.5}], [1, {
            "auxnet/mismatch_1": 0.25, "auxnet/speedup_predicted": 1.5, "auxnet/speedup_measured": 1.4,
        }]],
    },
}  # fmt: skip


def test_stages_have_no_rounds_and_a_timeline(tmp_path: Path) -> None:
    write(tmp_path, {**RUN, "strategy": "auxnet"}, STAGES)
    results, text = reported(tmp_path)
    shown = " ".join(text.replace("│", " ").split())
    for expected in (
        "AuxNet, 2 workers, 25 local steps ",
        "stage 1 from behind net.a to the output",
        "guess 1 minus truth 25.0%",
        "speed-up of steps that are not serial 1.40x predicted 1.50x",
        "held beside the stage, at most 5 kB",
        "sent by one worker 4.1 kB boundaries 4 kB, outputs 100 B",
        "DDP would have sent 300 kB 73.2 times as much",
        "time in steps, waiting included 6.00 s",
    ):
        assert expected in shown
    assert "local SGD" not in text
    assert (results["rounds"], results["local_steps_per_round"]) == (None, None)
    assert not (tmp_path / "partition.png").exists()
    assert {BLUE, SKY} <= colours(tmp_path / "timeline.png")
    assert BLUE in colours(tmp_path / "bytes.png")
    assert ORANGE not in colours(tmp_path / "bytes.png")


def test_stages_of_a_run_too_short_for_a_round(tmp_path: Path) -> None:
    write(
        tmp_path,
        {**RUN, "strategy": "auxnet"},
        {**STAGES, "method": {"rounds": [], "timeline": []}, "sent_by_round": []},
    )
    _, text = reported(tmp_path)
    assert "stage 1" in text
    assert "speed-up" not in text
    assert not (tmp_path / "timeline.png").exists()


def test_local_sgd_has_no_partition_to_draw(tmp_path: Path) -> None:
    run = {**RUN, "strategy": "local_sgd"}
    write(tmp_path, run, {**SUMMARY, "strategy": "local_sgd", "blocks": [], "partitions": [[[], []]] * 3})
    _, text = reported(tmp_path)
    assert not (tmp_path / "partition.png").exists()
    assert (tmp_path / "bytes.png").exists()
    assert text.startswith("Local SGD, 2 workers")


def test_ddp_shows_the_closed_form_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, {**RUN, "strategy": "ddp", "workers": 4})
    results, text = reported(tmp_path)
    assert results["sent_bytes"]["training"] == 25 * 1800 * 2 * 3 // 4
    assert not results["sent_bytes"]["measured"]
    assert "closed form, not measured" in text
    assert not (tmp_path / "bytes.png").exists()


def test_one_process_sends_nothing_and_holds_everything(tmp_path: Path) -> None:
    write(tmp_path, {**RUN, "strategy": "single", "workers": 1})
    results, text = reported(tmp_path)
    assert results["sent_bytes"]["training"] == 0
    assert results["parameters"]["held_share"] == 1
    assert "One process, 25 local steps" in text


def test_a_run_without_logger_and_callbacks_still_has_its_accuracy(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "strategy": "single", "workers": 1}))
    results, text = reported(tmp_path)
    assert results["test"]["accuracy"] == 0.975
    assert "97.50%" in text
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("strategy", "left_out", "held", "sent"),
    [
        ("resist", "round_monitor", None, None),
        ("ist", "round_monitor", None, None),
        ("auxnet", "round_monitor", None, None),
        ("local_sgd", "round_monitor", 1000, None),
        ("ddp", "clock", 1000, None),
        ("ddp", "round_monitor", 1000, 25 * 1800),
    ],
)
def test_what_a_callback_that_was_left_out_would_have_told_is_unknown(
    tmp_path: Path, strategy: str, left_out: str, held: int | None, sent: int | None
) -> None:
    """A run of ResIST without RoundMonitor was reported to hold 100 % and to send 0 B, DDP without Clock to send 0 B.

    AuxNet without RoundMonitor ended with a TypeError, behind its training.
    """
    write(tmp_path, {**RUN, "strategy": strategy}, metrics=METRICS)
    if left_out == "clock":
        (tmp_path / "clock.json").unlink()
    results, text = reported(tmp_path)
    assert (results["parameters"]["held_by_one_worker"], results["sent_bytes"]["training"]) == (held, sent)
    assert (f"unknown without callbacks.{left_out}" in text) == (None in (held, sent))
    assert "0 B" not in text
    assert (tmp_path / "accuracy.png").exists()


def test_another_folder_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    assert "has no run.json" in refusal(main, tmp_path, capsys)


def test_curves_skip_what_was_not_logged_in_a_step(usual: tuple[Path, dict[str, Any], str]) -> None:
    curves = read_curves(usual[0])
    assert curves["train/loss"] == Curve([4, 9, 14, 24], [2.0, 1.0, 0.5, 0.25])
    assert curves["val/acc"] == Curve([9, 24], [0.5, 0.75])


def test_smoothing_is_a_mean_over_neighbours() -> None:
    assert smoothed(Curve([1, 2, 3], [1.0, 2.0, 6.0]), reach=1).values == [1.5, 3.0, 4.0]


def test_numbers_in_words() -> None:
    counts = (0, 999, 1000, 87_700_000, 186_400_000, 4.5e9)
    assert [bytes_in_words(count) for count in counts] == ["0 B", "999 B", "1 kB", "87.7 MB", "186 MB", "4.5 GB"]
    assert [seconds_in_words(seconds) for seconds in (0.256, 75.04, 303)] == ["0.26 s", "75.0 s", "5 min 3 s"]

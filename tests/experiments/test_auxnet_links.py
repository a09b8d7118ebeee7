"""AuxNet's steps over links: what is sent, over what, and the tables; see test_links for the links themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.auxnet import link_tables, tables
from experiments.auxnet.cases import SERIAL_STAGES, LinkCase, base, link_cases
from experiments.auxnet.figure import draw_all
from experiments.auxnet.links import LEAST_BURST_BYTES
from experiments.auxnet.main import main
from experiments.auxnet.settings import parse
from experiments.harness.links import namespaces as rig
from experiments.harness.record import read_record
from tests.helpers.programs import ROOT, run_program

MISSING = rig.why_no_namespaces()
needs_namespaces = pytest.mark.skipif(bool(MISSING), reason=f"no network namespaces: {MISSING}")
PROGRAM = "experiments/auxnet/run.py"
GBIT, BOUNDARY, OUTPUT = 0.001, 8 * 8 * 8 * 8 * 4, 8 * 10 * 4
"""Of the smoke run: batches of 8, cut where there are 8 channels of 8 x 8; 10 classes."""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of the result file of the command itself, and what it printed; it leaves no namespace."""
    before = rig.namespaces_in_use()
    out = tmp_path_factory.mktemp("auxnet_links") / "new"
    yield out, run_program([PROGRAM, "links", "size=smoke", f"out={out}"], ROOT)
    assert rig.namespaces_in_use() == before


def rows_of(folder: Path, **wanted: Any) -> list[dict[str, Any]]:
    return tables.chosen(read_record(folder / "links.jsonl")["rows"], **wanted)


@needs_namespaces
def test_every_method_is_measured_over_every_link(smoke: tuple[Path, str]) -> None:
    cases = [row["case"] for row in rows_of(smoke[0])]
    assert cases == [case.key for case in link_cases(parse(["size=smoke"])[1])]
    assert len(cases) == 1 + 2 * 4
    assert {path.name for path in smoke[0].iterdir()} == {"links.jsonl", "links.png"}


@needs_namespaces
def test_counted_bytes_are_the_closed_form_and_what_the_kernel_saw(smoke: tuple[Path, str]) -> None:
    for row in rows_of(smoke[0], workers=2):
        outputs = 0 if row["case"]["method"] == "pipeline" else OUTPUT
        assert row["sent_by_formula"] == [BOUNDARY, BOUNDARY + outputs]
        if row["case"]["method"] != "pipeline":
            assert row["sent_by_step"] == row["sent_by_formula"]
        for kernel, formula in zip(row["kernel_sent_by_step"], row["sent_by_formula"], strict=True):
            assert formula < kernel < 1.5 * formula


@needs_namespaces
def test_steps_that_are_counted_go_over_the_shaped_link(smoke: tuple[Path, str]) -> None:
    """What the bucket does not hold waits for the link; before, there were steps that are not counted."""
    for method, counted in (("pipeline", 6), (SERIAL_STAGES, 6), ("penalty", 4)):
        for row in rows_of(smoke[0], method=method, bandwidth_gbit=GBIT):
            waiting = counted * BOUNDARY - LEAST_BURST_BYTES
            assert counted * row["mean_step_seconds"] > waiting * 8 / (GBIT * 1e9) > 0.2


@needs_namespaces
def test_a_second_run_measures_nothing_again(smoke: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = (smoke[0] / "links.jsonl").read_bytes()
    main(["links", "size=smoke", f"out={smoke[0]}"], "")
    assert (smoke[0] / "links.jsonl").read_bytes() == before
    assert "1/" not in capsys.readouterr().out.partition("Steps over links")[0]


@needs_namespaces
def test_what_is_printed_is_what_is_written(smoke: tuple[Path, str]) -> None:
    content = read_record(smoke[0] / "links.jsonl")
    for grid in tables.grids("links", content):
        assert grid.rows
        assert grid.title in smoke[1]
        assert all(len(line) == len(grid.header) for line in grid.rows)


def test_without_root_or_tools_only_unshaped_links_are_measured(tmp_path: Path) -> None:
    output = run_program(
        [PROGRAM, "links", "size=smoke", "methods=[penalty]", f"out={tmp_path}"], ROOT, PATH="/nowhere"
    )
    assert "No shaped links: no ip and no tc here" in " ".join(output.split())
    rows = rows_of(tmp_path)
    assert [row["case"]["method"] for row in rows] == [SERIAL_STAGES, "penalty"]
    assert all(row["case"]["bandwidth_gbit"] is None for row in rows)
    assert all(row["kernel_sent_by_step"] == [None, None] for row in rows)


def test_all_steps_in_series_are_of_a_warm_up_and_turns_go_about() -> None:
    cases = link_cases(parse(["links", "repeats=2", "link_networks=[resnet_38]", "bandwidths_gbit=[1,unshaped]"])[1])
    assert len(cases) == 2 * (1 + 2 * 4)
    assert [case.seed for case in cases] == [0] * 9 + [1] * 9
    assert [case.bandwidth_gbit for case in cases[:9]] == [None] + [1.0] * 4 + [None] * 4
    assert {case.warmup_steps for case in cases if case.method == SERIAL_STAGES} == {12}
    assert {case.warmup_steps for case in cases if case.method == "penalty"} == {2}
    assert [case.schedule for case in cases[:3]] == [None, "gpipe", "1f1b"]


def row(method: str, turn: int, seconds: float, gbit: float | None = None) -> dict[str, Any]:
    """A step of two workers who send 400,000 bytes each: 64 ms at 0.1 Gbit/s, one direction after the other."""
    case = base("resnet_38", method, 1 if method == "serial" else 2, turn)
    return {
        "case": LinkCase(**case.key, bandwidth_gbit=gbit).key, "step_seconds": seconds,
        "sent_by_formula": [400_000, 400_000], "sent_by_step": [None if method == "pipeline" else 400_000.0] * 2,
        "kernel_sent_by_step": [408_000.0, 408_000.0],
    }  # fmt: skip


ROWS = [
    row("serial", 0, 0.1), row("serial", 1, 0.2),
    row("penalty", 0, 0.1), row("penalty", 0, 0.12, 0.1), row("penalty", 1, 0.2), row("penalty", 1, 0.24, 0.1),
    row(SERIAL_STAGES, 0, 0.125, 0.1), row("pipeline", 0, 0.1, 0.1), row("pipeline", 0, 0.1, None),
]  # fmt: skip
CONTENT = {
    "machine": {"cores": 2, "processor": "x", "torch": "2"},
    "settings": {"size": "full", "link_steps": 12},
    "rows": ROWS,
}


def test_what_a_link_costs_is_told_against_the_same_turn() -> None:
    """A machine half as fast in the second turn: ratios do not change by it."""
    found = link_tables.links(CONTENT).rows
    assert found[0][1:6] == ["one process", "none", "150.0", "100.0 to 200.0", "1.00"]
    assert found[1][1:] == [
        "AuxNet, penalty", "0.1 Gbit/s", "180.0", "120.0 to 240.0", "0.83", "1.20", "30.0", "64.0", "53 %", "2",
    ]  # fmt: skip
    assert found[2][2:] == ["unshaped", "150.0", "100.0 to 200.0", "1.00", "-", "-", "-", "-", "2"]
    assert found[3][6:10] == ["1.00", "0.0", "64.0", "100 %"]
    assert found[5][1:] == [
        "stages in series (AuxNet's warm-up)", "0.1 Gbit/s", "125.0", "125.0 to 125.0",
        "0.80", "-", "-", "64.0", "-", "1",
    ]  # fmt: skip


def test_bytes_are_of_both_directions() -> None:
    found = link_tables.link_bytes(CONTENT).rows
    assert found[0][2:] == ["0.1 Gbit/s", "800,000", "800,000", "816,000", "1.0200"]
    assert found[2][1:] == ["pipeline (torch's)", "0.1 Gbit/s", "800,000", "-", "816,000", "1.0200"]
    assert len(found) == 5


def test_the_conditions_name_cuts_and_turns() -> None:
    told = tables.link_conditions(CONTENT)
    assert told.startswith("K = 2, cut at resnet_38 behind section2.0, batch 64. Median")
    assert "first third of 12, median over n = 2 trainings" in told


def test_the_picture_has_a_line_for_each_method(tmp_path: Path) -> None:
    (tmp_path / "links.jsonl").write_text(json.dumps(CONTENT))
    (drawn,) = draw_all(tmp_path)
    with Image.open(drawn) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}  # type: ignore[union-attr]
    blue, green = (0, 114, 178), (0, 158, 115)
    assert {blue, green} <= colours

"""AuxNet's steps over links: bytes, the links they cross, and the tables; see test_links for the links themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.auxnet.cases import SERIAL_STAGES, links
from experiments.auxnet.links import LEAST_BURST_BYTES
from experiments.auxnet.run import Options
from experiments.harness import cli
from experiments.harness.links import namespaces as rig
from experiments.harness.record import read_record
from experiments.harness.tables import chosen
from tests.helpers.namespaces import needs_namespaces
from tests.helpers.programs import run_module

PROGRAM = "experiments.auxnet.run"
GBIT, BOUNDARY, OUTPUT = 0.001, 8 * 8 * 8 * 8 * 4, 8 * 10 * 4
"""The smoke run's link, and bytes: batches of 8, cut at 8 channels of 8 x 8; 10 classes."""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of the result file of the command itself, and its output; it leaves no namespace."""
    before = rig.namespaces_in_use()
    out = tmp_path_factory.mktemp("auxnet_links") / "new"
    yield out, run_module(PROGRAM, "links", "size=smoke", f"out={out}")
    assert rig.namespaces_in_use() == before


def rows_of(folder: Path, **wanted: Any) -> list[dict[str, Any]]:
    return chosen(read_record(folder / "links.jsonl")["rows"], **wanted)


@needs_namespaces
def test_every_method_is_measured_over_every_link(smoke: tuple[Path, str]) -> None:
    cases = [row["case"] for row in rows_of(smoke[0])]
    assert cases == [case.key for case in links(cli.read(["size=smoke"], Options)[1])]
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
    """Bytes beyond the bucket's size wait for the link; uncounted steps have emptied the bucket before."""
    for method, counted in (("pipeline", 6), (SERIAL_STAGES, 6), ("penalty", 4)):
        for row in rows_of(smoke[0], method=method, bandwidth_gbit=GBIT):
            waiting = counted * BOUNDARY - LEAST_BURST_BYTES
            assert counted * row["mean_step_seconds"] > waiting * 8 / (GBIT * 1e9) > 0.2


def test_without_root_or_tools_only_unshaped_links_are_measured(tmp_path: Path) -> None:
    output = run_module(PROGRAM, "links", "size=smoke", "methods=[penalty]", f"out={tmp_path}", PATH="/nowhere")
    assert "No shaped links: no ip and no tc here" in " ".join(output.split())
    rows = rows_of(tmp_path)
    assert [row["case"]["method"] for row in rows] == [SERIAL_STAGES, "penalty"]
    assert all(row["case"]["bandwidth_gbit"] is None for row in rows)
    assert all(row["kernel_sent_by_step"] == [None, None] for row in rows)


def test_all_steps_in_series_are_of_a_warm_up_and_turns_go_about() -> None:
    arguments = ["repeats=2", "link_networks=[resnet_38]", "bandwidths_gbit=[1,unshaped]"]
    cases = links(cli.read(arguments, Options)[1])
    assert len(cases) == 2 * (1 + 2 * 4)
    assert [case.seed for case in cases] == [0] * 9 + [1] * 9
    assert [case.bandwidth_gbit for case in cases[:9]] == [None] + [1.0] * 4 + [None] * 4
    assert {case.warmup_steps for case in cases if case.method == SERIAL_STAGES} == {12}
    assert {case.warmup_steps for case in cases if case.method == "penalty"} == {2}
    assert [case.schedule for case in cases[:3]] == [None, "gpipe", "1f1b"]

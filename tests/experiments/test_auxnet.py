"""AuxNet's experiments: all methods train on the same images, and counts are the closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from experiments.auxnet.cases import ALL, LATE, STUDIES, base
from experiments.auxnet.closed_form import hybrid_speed_up, pipeline_speed_up, sent_bytes
from experiments.auxnet.methods import Pipelined, Serial, boundary_elements, parameters_of
from experiments.auxnet.run import Options, run
from experiments.auxnet.training import Clock, Job, make_network, prepared, stream_of
from experiments.harness import cli
from experiments.harness.record import read_record
from experiments.harness.tables import chosen
from experiments.networks import SmallImageResNet, layers
from resist_lightning.methods.residual import find_blocks
from tests.helpers.processes import run_workers
from tests.helpers.programs import refusal, run_module

# One value of each setting, the default if there is one: equal cases are trained once.
SMOKE = ["size=smoke", "betas=[1.0]", "aux_widths=[32]", "evaluations=1"]


def main(arguments: list[str]) -> int:
    return cli.run(run, Options, "", list(STUDIES), arguments)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all result files of the command itself, and its output."""
    out = tmp_path_factory.mktemp("auxnet") / "new"
    return out, run_module("experiments.auxnet.run", "accuracy", "sweep", "timing", *SMOKE, f"out={out}")


def record(folder: Path, name: str) -> Any:
    return read_record(folder / f"{name}.jsonl")


def rows_of(folder: Path, name: str, **wanted: Any) -> list[dict[str, Any]]:
    return chosen(record(folder, name)["rows"], **wanted)


def test_every_case_is_trained_once(smoke: tuple[Path, str]) -> None:
    options = cli.read(SMOKE, Options)[1]
    for name in ("accuracy", "sweep", "timing"):
        cases = [row["case"] for row in record(smoke[0], name)["rows"]]
        assert cases == [case.key for case in STUDIES[name](options)]
        assert len(cases) >= 6
    assert all(row["steps"] == 2 * row["steps_per_epoch"] == 16 for row in record(smoke[0], "accuracy")["rows"])


def test_one_worker_alone_is_training_in_one_process(smoke: tuple[Path, str]) -> None:
    (alone,) = rows_of(smoke[0], "accuracy", method="penalty", workers=1)
    (serial,) = rows_of(smoke[0], "accuracy", method="serial", augment=True)
    assert alone["curve"] == serial["curve"]
    assert rows_of(smoke[0], "accuracy", method="serial", augment=False)[0]["curve"] != serial["curve"]


def test_live_bytes_are_the_closed_form(smoke: tuple[Path, str]) -> None:
    """Widths 4, 8, 16, a block each, cut after the block of width 8: by hand."""
    first = 36 + (2 * 8 + 2 * 144) + (8 + 16 + 288 + 576 + 32)
    second = (16 + 32 + 1152 + 2304 + 128) + 32 + 170
    image, width, boundary = 1, 32, 8
    aux = 9 * image * width + 2 * width + 2 * (9 * width * width + 2 * width) + width * boundary + boundary
    for row in record(smoke[0], "accuracy")["rows"]:
        if row["case"]["workers"] != 2 or row["case"]["method"] in LATE:
            continue
        own = {"penalty": aux, "hybrid": aux, "al-net": aux + width * boundary + boundary}.get(row["case"]["method"], 0)
        assert row["parameters"] == [first, second]
        assert row["held_bytes"] == row["held_by_formula"] == [12 * first, 12 * (second + own)]


def test_counted_bytes_are_the_closed_form(smoke: tuple[Path, str]) -> None:
    elements, batch = 8 * 4 * 4, 8
    for row in record(smoke[0], "accuracy")["rows"]:
        if row["case"]["workers"] == 2:
            outputs = 0 if row["case"]["method"] == "pipeline" else batch * 10 * 4
            assert row["sent_by_formula"] == [batch * elements * 4, batch * elements * 4 + outputs]
            if row["case"]["method"] not in ("pipeline", *LATE):
                assert row["sent_by_step"] == row["sent_by_formula"]


def test_late_gradients_are_simulated_for_accuracy_and_timed_in_processes(smoke: tuple[Path, str]) -> None:
    warmups = []
    for method in LATE:
        (simulated,) = rows_of(smoke[0], "accuracy", method=method)
        assert "step_seconds" not in simulated
        assert simulated["curve"][-1]["test"] == simulated["last"]
        warmups.append(simulated["case"]["warmup_steps"])
    assert warmups == [None, 2]
    (timed,) = rows_of(smoke[0], "timing", method="delayed")
    assert timed["step_seconds"] > 0
    assert timed["sent_by_step"] == timed["sent_by_formula"]
    first, second = timed["parameters"]
    # Parameters, gradients and momentum; and two copies of the first stage's weights.
    assert timed["held_bytes"] == timed["held_by_formula"] == [(12 + 8) * first, 12 * second]


def test_stored_guesses_are_one_of_each_image(smoke: tuple[Path, str]) -> None:
    for method, numbers in (("penalty-store", 1), ("al-store", 2)):
        (row,) = rows_of(smoke[0], "accuracy", method=method)
        assert row["stored_bytes"] == [0, numbers * 64 * 8 * 4 * 4 * 4]  # 64 images fill whole steps


def test_what_is_said_of_guesses_is_there_for_auxiliary_networks_only(smoke: tuple[Path, str]) -> None:
    for row in record(smoke[0], "accuracy")["rows"]:
        if row["case"]["workers"] == 2 and row["case"]["method"] not in ("pipeline", *LATE):
            assert (row["aux_fed"] is None) == row["case"]["method"].endswith("-store")
            assert 0 <= row["running"] <= 100
            assert len(row["mismatch"]) == 1
            assert row["mismatch"][0] > 0
            assert row["predicted"] > 0
            assert row["timeline"] is None


def test_the_timeline_of_one_step_is_kept_once_for_each_network(smoke: tuple[Path, str]) -> None:
    kept = [row["timeline"] for row in record(smoke[0], "timing")["rows"] if row["timeline"]]
    assert [[spans[0][0] for spans in timeline] for timeline in kept] == [["data", "data"]]


def first_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    data = prepared("digits", "smoke", None, "")
    stream = data.stream(8, 0)
    return [stream.batch(step, 0, 1) for step in range(count)]


def _pipelines(worker: int, cuts: tuple[str, ...], kinds: list[tuple[str, int]]) -> list[dict[str, Tensor]]:
    assert dist.get_world_size() == len(cuts) + 1
    trained = []
    for schedule, micro_batches in kinds:
        method = Pipelined(lambda: make_network("digits", "smoke", 0), cuts, 0.1, schedule, micro_batches)
        for x, y in first_batches(3):
            method.step(x, y)
        with method.full_model() as model:
            trained += [model.state_dict()] if worker == 0 else []
    return trained


@pytest.mark.parametrize(("workers", "kinds"), [(2, [("gpipe", 1), ("1f1b", 2)]), (3, [("gpipe", 4)])])
def test_a_pipeline_is_back_propagation_by_micro_batches(workers: int, kinds: list[tuple[str, int]]) -> None:
    trained = run_workers(_pipelines, workers, ALL["digits"].scales["smoke"].cuts[workers], kinds)[0]
    for (_, micro_batches), found in zip(kinds, trained, strict=True):
        check_against_one_process(found, micro_batches)


def check_against_one_process(found: dict[str, Tensor], micro_batches: int) -> None:
    serial = Serial(make_network("digits", "smoke", 0), 0.1)
    start = serial.network.state_dict()["section3.0.conv2.weight"].clone()
    for x, y in first_batches(3):
        serial.optimizer.zero_grad()
        for part, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (functional.cross_entropy(serial.network(part), labels) / micro_batches).backward()
        serial.optimizer.step()
    expected = serial.network.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(start, expected["section3.0.conv2.weight"])


def test_closed_forms_by_hand() -> None:
    assert sent_bytes("penalty", 2, [5, 7], 10) == [40, 96, 56 + 2 * 80]
    assert sent_bytes("pipeline", 2, [5, 7], 10) == [40, 96, 56]
    assert sent_bytes("serial", 2, [], 10) == [0]
    assert pipeline_speed_up(2, 4, compute=8.0) == 2 * 4 / 5
    assert pipeline_speed_up(3, 6, compute=8.0, data=1.0) == pytest.approx(9 / (1 + 8 / 3 * 8 / 6))
    assert pipeline_speed_up(3, 1, compute=8.0) == 1
    assert hybrid_speed_up(2.0, 4) == 4 / 2.5
    assert hybrid_speed_up(2.0, 1) == 1
    assert hybrid_speed_up(2.0, 10**9) == pytest.approx(2)


def test_steps_of_two_kinds_are_weighed_by_how_often_they_come() -> None:
    clock = Clock(data=[0.0] * 11, whole=[99.0, *[4.0, 1.0, 1.0] * 3, 4.0])
    assert clock.told(1, 3)["step_seconds"] == 2
    assert clock.told(1)["step_seconds"] == 1
    assert Clock([0.0], [5.0]).told(3, 4)["step_seconds"] == 5


def test_the_networks_are_those_of_their_names() -> None:
    with torch.device("meta"):
        deep, wide = SmallImageResNet(18, 16), SmallImageResNet(2, 64)
    assert layers(18) == 110
    assert len(find_blocks(deep)) == 54
    assert sum(p.numel() for p in deep.parameters()) == pytest.approx(1.73e6, rel=0.01)  # He et al.: 1.7 M
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(2.75e6, rel=0.02)  # WRN-16-4: 2.8 M
    elements = boundary_elements(deep, ["section1.17", "section2.0"], (3, 32, 32))
    assert elements == [16 * 32 * 32, 32 * 16 * 16]
    assert sum(parameters_of(deep, ["section2.0"])) == sum(p.numel() for p in deep.parameters())
    with pytest.raises(ValueError, match="blocks=0 and width=16"):
        SmallImageResNet(0)


@pytest.mark.parametrize("task", ALL)
def test_every_task_can_be_cut_where_it_says(task: str) -> None:
    """In the full size; the smoke run above cuts the network that is the smoke size of all."""
    with torch.device("meta"):
        network = make_network(task, "full", 0)
    for workers, cuts in ALL[task].scales["full"].cuts.items():
        found = parameters_of(network, cuts)
        assert len(found) == workers
        assert min(found) > 0
    assert ALL[task].scales["smoke"] == ALL["digits"].scales["smoke"]


def test_an_epoch_has_every_image_of_the_epochs_behind_it() -> None:
    case = replace(base("digits", "penalty-store", 2, 0), augment=False)
    job = Job(case, "smoke", prepared("digits", "smoke", None, ""), 1, frozenset(), 1)
    stream = stream_of(job)
    epochs = [[stream.batch(8 * epoch + step, 0, 1)[0] for step in range(8)] for epoch in range(2)]
    images = [{image.numpy().tobytes() for batch in epoch for image in batch} for epoch in epochs]
    assert images[0] == images[1]
    assert len(images[0]) == 64
    assert not torch.equal(epochs[0][0], epochs[1][0])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("bandwidths_gbit=[0]", "0 must be a number of Gbit/s from 0.001 to 100, or unshaped"),
        ("schedule=1f1b workers=[3]", "schedule=1f1b needs as many micro-batches as workers"),
        ("micro_batches=3", "digits has batches of 8, which must be a multiple"),
        ("tasks=[cifar_deep]", "folder=None: cifar_deep needs a folder with train/<class>/*"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    option: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(lambda: main(["size=smoke", *option.split()]), tmp_path, capsys)

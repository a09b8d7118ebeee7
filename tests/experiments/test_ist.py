"""IST's experiments: every training is on equal samples, counts are the closed forms, and the tables show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from experiments.harness import cli
from experiments.harness.record import read_record
from experiments.ist import tables
from experiments.ist.cases import TASKS, Case, base, cases
from experiments.ist.run import STUDIES, Options, run
from experiments.ist.shapes import Shape, speed_up, volumes
from experiments.ist.training import finisher, make_network, make_start, measure, sent_bytes, train
from experiments.links.closed_form import _of_neurons, neuron_bytes
from resist_lightning import NeuronConfig, NeuronSimulator, Simulator
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.namespaces import needs_namespaces
from tests.helpers.programs import refusal, run_module

CHOSEN = ["tasks=[digits]", "workers=[2,4]", "passes=4"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all result files of the command itself, and its output."""
    out = tmp_path_factory.mktemp("ist") / "new"
    output = run_module("experiments.ist.run", "size=smoke", f"out={out}", *CHOSEN)
    return out, output


def record(folder: Path, name: str) -> Any:
    return read_record(folder / f"{name}.jsonl")


def test_every_case_is_trained_once_on_equal_samples(sample: tuple[Path, str]) -> None:
    rows = record(sample[0], "accuracy")["rows"]
    wanted = cases(cli.read(["size=smoke", *CHOSEN], Options)[1])
    assert sorted(str(row["case"]) for row in rows) == sorted(str(case.key) for case in wanted)
    assert len(rows) > 30
    assert {row["samples"] for row in rows} == {4 * 384}  # 450 images without 10 %: three steps of 8 workers of 16
    assert {row["local_steps_done"] * row["case"]["workers"] for row in rows} == {96}
    assert all(len(row["policies"]) == 3 for row in tables.usual(rows, method="ist"))


def test_live_tensors_are_the_closed_form_of_memory(sample: tuple[Path, str]) -> None:
    content, width, inputs = record(sample[0], "memory"), 64, 32
    assert [group["workers"] for group in content["groups"]] == [1, 2]
    for group in content["groups"]:
        workers = group["workers"]
        inner = 2 * (width // workers) ** 2
        outer = (inputs + 35 + 3 * 2) * width // workers  # and a norm of two after each of three hidden layers
        assert len(group["by_worker"]) == workers
        for worker in group["by_worker"]:
            assert len(worker["steps"]) == 4
            for step in worker["steps"]:
                assert step["parameters"] == step["gradients"] == step["momentum"] == 4 * (inner + outer + 35)
                assert step["inner"] == 3 * 4 * inner
                assert step["store"] == (4 * 2 * width**2 // workers if workers > 1 else 0)
            assert worker["peak_resident"] >= worker["steps"][-1]["resident"] * 0.9 > 1e7


WEIGHTS = {
    (4096, 2): 8_460_288, (4096, 4): 4_230_144, (4096, 8): 2_115_072,
    (8192, 2): 33_697_792, (8192, 4): 12_654_592, (8192, 8): 5_278_720,
}  # fmt: skip


@pytest.mark.parametrize(("width", "workers"), WEIGHTS)
def test_the_papers_networks_have_the_weights_and_bytes_counted_by_hand(width: int, workers: int) -> None:
    """Section 3 for the weights. Bytes: the probability that a number's next place is another worker."""
    found = volumes(Shape(4096, width), workers, 4)
    assert found["weights"] == WEIGHTS[width, workers]
    hidden, moves, share = (1, 2)[width == 8192], 1 - 1 / workers, 1 / workers
    numbers = (4096 + 35 + 4 * hidden) * width * moves
    if hidden == 2:  # in a slice before, after, or both; entries in the store before and after stay
        numbers += width**2 * moves * (2 * share - share**2)
    assert found["ist_round"] == pytest.approx(4 * numbers / workers, rel=0.02)
    parameters = (4096 + 35 + 2 * hidden) * width + (width**2 if hidden == 2 else 0)
    assert found["ddp_step"] == 2 * (workers - 1) * 4 * parameters // workers


@pytest.mark.parametrize("min_share", [0, None])
def test_what_is_sent_is_received(min_share: float | None) -> None:
    net = make_network("digits", "smoke")
    layout = NeuronLayout(net, NeuronConfig(min_share=min_share), 4)
    states = OptimizerStates([torch.optim.SGD(net.parameters(), 0.1)])
    for number in range(3):
        each = [_of_neurons(layout, states, number, worker) for worker in range(4)]
        assert [own["sent"] for own in each] == neuron_bytes(layout, states, number)
        assert sum(own["sent"] for own in each) == sum(own["received"] for own in each)
        assert len({own["sent"] for own in each}) > 1


def trained(case: Case, steps: int, finish_at: int | None = None) -> list[torch.Tensor]:
    trainer = train(case, "smoke", steps, finish_at or steps)
    return list(trainer.full_model().parameters())


@pytest.mark.parametrize("method", ["ist", "local_sgd"])
def test_one_worker_of_each_method_is_ordinary_training(method: str) -> None:
    alone = trained(base("digits", "single", 1, 0), 5)
    other = trained(replace(base("digits", method, 1, 0), local_steps=2), 5)
    start = list(make_start(base("digits", "single", 1, 0), "smoke").parameters())
    assert all(map(torch.equal, alone, other))
    assert not any(map(torch.equal, alone, start))


def test_two_workers_of_ist_are_not_those_of_local_sgd() -> None:
    ist, averaged = (trained(base("digits", method, 2, 0), 3) for method in ("ist", "local_sgd"))
    assert not any(map(torch.equal, ist, averaged))


def test_a_finish_is_local_sgd_from_the_full_model() -> None:
    case = replace(base("digits", "ist", 2, 0), local_steps=3, finish=True)
    start = make_start(case, "smoke")
    trainer = finisher(case, start)
    for worker in trainer.simulator.workers:
        assert all(map(torch.equal, worker.module.parameters(), start.parameters()))
    full = sum(t.nbytes for t in [*start.parameters(), *start.buffers()])
    before = sent_bytes(replace(case, finish=False), "smoke", 27, 27)
    shared = 4 * 10 + 2 * 8  # the output's bias, and two counters of batches
    # Nine rounds have eight syncs; then each of two workers sends its half to the other; then one average.
    assert sent_bytes(case, "smoke", 30, 27) == before + (full - shared) / 2 + full
    alone = trained(replace(case, method="single", workers=1), 10)
    assert all(map(torch.equal, alone, trained(replace(case, workers=1), 10, finish_at=6)))
    assert isinstance(train(case, "smoke", 4, 4).simulator, NeuronSimulator)
    assert isinstance(train(case, "smoke", 4, 3).simulator, Simulator)
    finished, usual = (measure(replace(case, finish=last), "smoke", 1) for last in (True, False))
    assert finished["curve"][0] == usual["curve"][0]
    assert finished["sent_bytes"] > usual["sent_bytes"]


def test_bytes_of_the_other_methods_by_hand() -> None:
    parameters = 64 * 16 + 16 * 16 + 16 * 10 + 10 + 2 * 2 * 16
    whole = 4 * (parameters + 2 * 2 * 16) + 2 * 8  # running statistics, and two counters of batches
    case = base("digits", "ddp", 2, 0)
    assert sent_bytes(case, "smoke", 100, 100) == 100 * 4 * parameters
    assert sent_bytes(base("digits", "single", 1, 0), "smoke", 100, 100) == 0
    assert sent_bytes(base("digits", "local_sgd", 2, 0), "smoke", 100, 100) == 4 * whole  # the last round has no sync
    travelling = replace(base("digits", "ist", 2, 0), sgd_momentum=0.9, momentum="travel")
    kept = replace(travelling, momentum="reset")
    assert sent_bytes(travelling, "smoke", 100, 100) > 1.5 * sent_bytes(kept, "smoke", 100, 100)


def test_bytes_of_ist_are_those_of_the_rounds_that_end_before_the_training() -> None:
    net = make_network("digits", "smoke")
    layout = NeuronLayout(net, NeuronConfig(seed=7, min_share=0), 4)
    states = OptimizerStates([torch.optim.SGD(net.parameters(), 0.1)])
    rounds = [mean(neuron_bytes(layout, states, number)) for number in range(3)]
    assert len(set(rounds)) == 3
    case = base("digits", "ist", 4, 7)
    for steps, synced in ((20, 0), (21, 1), (60, 2), (61, 3)):
        assert sent_bytes(case, "smoke", steps, steps) == sum(rounds[:synced])


def test_the_speed_up_by_formula() -> None:
    volume = {"workers": 4, "ist_round_most": 25_000_000, "local_sgd_round": 250_000_000, "ddp_step": 125_000_000}
    found = speed_up({"seconds": {"1": 2.0, "4": 0.9}}, volume, 0.1)
    assert found["ist"] == pytest.approx(0.9 + 2 / 20)
    assert found["local_sgd"] == pytest.approx(2 + 20 / 20)
    assert found["ddp"] == 10.0  # longer than the compute, which is hidden
    assert (found["over_local_sgd"], found["over_ddp"]) == (pytest.approx(3), pytest.approx(10))


@needs_namespaces
def test_over_a_link_the_kernel_counts_what_the_closed_form_says(tmp_path: Path) -> None:
    run_module("experiments.links.run", "size=ist_smoke", "methods=[ist,none]", f"out={tmp_path}")
    content = read_record(tmp_path / "links.jsonl")
    (ist, silent) = content["runs"]
    for worker in ist["workers"]:
        counted = sum(worker["counted"].get(kind, 0) for kind in ("shared", "hand_over", "state"))
        assert counted == sum(sync["sent"] for sync in worker["closed_form"]) > 1e6
        assert counted <= worker["kernel"]["sent"] <= 1.03 * counted + 20_000
        assert worker["model_bytes"] == 4 * (4096 * 256 + 256**2 + 35 * 256 + 35 + 4 * 256)
        assert worker["subnet_bytes"] == 4 * (4096 * 128 + 128**2 + 35 * 128 + 35 + 4 * 128)
    assert all(worker["counted"].get("hand_over", 0) == 0 for worker in silent["workers"])


@needs_namespaces
def test_time_to_accuracy_of_ist(tmp_path: Path) -> None:
    run_module("experiments.time_to_accuracy.run", "size=ist_smoke", f"out={tmp_path}")
    rows = read_record(tmp_path / "time_to_accuracy.jsonl")["rows"]
    assert [(entry["method"], entry["steps"]) for entry in rows] == [("ddp", [4, 8]), ("ist", [4, 8])]
    assert 0 < rows[1]["kernel_sent_bytes"][1] < rows[0]["kernel_sent_bytes"][1] / 4


def test_a_width_below_the_workers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(lambda: cli.run(run, Options, "", STUDIES, ["size=smoke", "widths=[1]"]), tmp_path, capsys)
    assert "widths=[1]: must be at least 2, a neuron for each" in told


def test_the_tasks_are_wide_enough_for_eight_workers() -> None:
    for task in TASKS.values():
        assert all(width >= 8 for width in task.width.values())
    linear = [layer for layer in make_network("speech_shaped", "smoke") if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [32, 16, 16]

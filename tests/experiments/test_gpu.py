"""The GPU script: its plan, limits on cases, and criteria of failure; and a smoke run of its contracts."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.faults.cases import possible
from experiments.gpu import cases, contracts, hardware, limits
from experiments.gpu.cases import PARTS, Allowance, Contract, Probe, chosen_backend, chosen_parts
from experiments.gpu.run import NINE_MINUTES, Options, is_bad, run
from experiments.gpu.tables import in_order, outcome
from experiments.harness import cli
from experiments.harness.record import read_record
from experiments.trainers import differences
from tests.helpers.programs import refusal, run_module

_, FULL = cli.read([], Options)


# A smoke run.


def test_a_smoke_run(tmp_path: Path) -> None:
    smoke = ["size=smoke", "methods=[resist]", "modes=[fp32]", f"out={tmp_path}"]
    told = run_module("experiments.gpu.run", "contracts", "memory", "steps", *smoke)

    found = {name: read_record(tmp_path / f"{name}.jsonl") for name in ("probes", "contracts", "memory", "steps")}
    assert {row["reason"] for row in found["probes"]["rows"]} == {"no GPU"}
    alone, nodes = in_order(found["contracts"], "devices_per_worker")
    for row in (alone, nodes) if contracts.has_nodes("resist") else (alone,):
        assert (row["outcome"], row["broken"], row["backend"]) == ("done", [], "gloo"), row
        assert len(row["evaluations"]) == 2
        assert row["largest_change_by_training"] > 0.01
    assert alone["equal_tensors"] == alone["tensors"] > 50  # two addends have only one order
    assert alone["sent_bytes"] == alone["sent_bytes_by_formula"] != [0, 0]
    assert "agrees" in told

    (memory,) = found["memory"]["rows"]
    for worker in memory["by_worker"]:
        assert worker["at_rest"]["held"] == worker["at_rest"]["closed_form"] < worker["full"]
        assert worker["peaks"].keys() == {"training", "sync", "evaluation", "checkpoint"}
    (steps,) = found["steps"]["rows"]
    assert steps["ratio"] == steps["median_seconds"]["sub-network"] / steps["median_seconds"]["plain loop"]
    assert all(content["machine"]["torch"] == torch.__version__ for content in found.values())


def test_the_full_size_without_a_gpu_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "size=smoke" in refusal(
        lambda: cli.run(run, Options, "", list(PARTS), ["memory", "out=new"]), tmp_path, capsys
    )


# The plan.


def test_parts_that_need_a_backend_come_after_the_probes() -> None:
    assert chosen_parts(["faults"]) == ["probes", "faults"]
    assert chosen_parts(["steps", "memory"]) == ["memory", "steps"]
    assert chosen_parts(list(PARTS)) == list(PARTS) == ["probes", "contracts", "memory", "steps", "faults", "accuracy"]


def test_the_full_size_has_every_case_once() -> None:
    planned = {name: part.cases(FULL) for name, part in PARTS.items()}
    assert {name: len(found) for name, found in planned.items()} == {
        "probes": 4, "contracts": 2 * 3 + 3, "memory": 1, "steps": 5, "faults": 2 * 3 * 2, "accuracy": 4,
    }  # fmt: skip
    for found in planned.values():
        assert len({str(case.key) for case in found}) == len(found)
    assert {(case.ranks, case.devices_per_worker) for case in planned["contracts"]} == {(2, 1), (4, 1), (4, 2)}
    assert {(case.kind, case.place) for case in planned["faults"]} <= set(possible())
    assert all(case.fault.worker == 1 for case in planned["faults"])


def test_the_limits_leave_room_in_nine_minutes() -> None:
    assert FULL.seconds + 15 <= NINE_MINUTES == 540  # time to kill the last case, and to make the tables
    for part in PARTS.values():
        assert part.seconds_of_a_case <= part.seconds
    assert PARTS["accuracy"].seconds_of_a_case > FULL.training_seconds


@pytest.mark.parametrize(
    ("allowance", "seconds", "refusal"),
    [
        (Allowance(20, 100, 500), 20, None),
        (Allowance(20, 12, 500), 12, None),
        (Allowance(20, 100, 7), 7, None),
        (Allowance(20, 4.9, 500), 4.9, "no time: 5 s were left to the part"),
        (Allowance(20, 100, 3), 3, "no time: 3 s were left to the command"),
        (Allowance(20, -2, -9), -9, "no time: 0 s were left to the command"),
    ],
)
def test_a_case_has_the_least_of_three_limits(allowance: Allowance, seconds: float, refusal: str | None) -> None:
    assert (allowance.seconds, allowance.refusal) == (seconds, refusal)


@pytest.mark.parametrize(
    ("device", "ranks", "working", "chosen"),
    [
        ("cpu", 2, [Probe(2)], ("gloo", False)),
        ("cuda", 2, [Probe(2), Probe(2, classic=True)], ("nccl", False)),
        ("cuda", 4, [Probe(4, classic=True)], ("nccl", True)),
        ("cuda", 4, [Probe(2)], ("gloo", False)),
        ("cuda", 2, [], ("gloo", False)),
    ],
)
def test_nccl_is_taken_where_a_probe_came_through(
    device: str, ranks: int, working: list[Probe], chosen: tuple[str, bool]
) -> None:
    assert chosen_backend(device, ranks, working.__contains__) == chosen


def test_every_nccl_rank_has_a_host_of_its_own() -> None:
    hosts = {hardware.nccl_variables(rank, classic=False)["NCCL_HOSTID"] for rank in range(4)}
    assert len(hosts) == 4
    assert "TORCH_DIST_USE_NCCL2" not in hardware.nccl_variables(0, classic=False)
    assert hardware.nccl_variables(0, classic=True)["TORCH_DIST_USE_NCCL2"] == "0"


# Criteria of failure.

GOOD = {
    "ranks_equal": True, "largest_difference": 1e-7, "largest_change_by_training": 1.0,
    "largest_difference_of_evaluations": 0.0, "sent_bytes": [8, 8], "sent_bytes_by_formula": [8, None],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"ranks_equal": False}, ["the ranks end with different models"]),
        ({"largest_difference": 2e-6}, ["not the simulator's model"]),
        ({"largest_difference": math.nan}, ["not the simulator's model"]),
        ({"largest_change_by_training": 0.01}, ["not the simulator's model"]),
        ({"largest_difference_of_evaluations": math.nan}, ["not the simulator's evaluations"]),
        ({"sent_bytes": [12, 8]}, ["not the bytes of the closed form"]),
    ],
)
def test_what_a_comparison_breaks(changed: dict[str, Any], found: list[str]) -> None:
    assert contracts.broken({**GOOD, **changed}) == found


def test_who_must_look() -> None:
    assert not is_bad({"outcome": "done", "broken": []})
    assert not is_bad({"outcome": "skipped"})
    assert is_bad({"outcome": "killed"})
    assert is_bad({"outcome": "done", "broken": ["a contract"]})
    assert is_bad({"outcome": "done", "findings": ["hang"]})


def test_two_models_are_compared_by_their_worst_tensor() -> None:
    before = {"a": torch.zeros(2), "b": torch.zeros(1), "seen": torch.tensor(3)}
    ours = {"a": torch.tensor([1.0, -4.0]), "b": torch.ones(1), "seen": torch.tensor(5)}
    theirs = {"a": torch.tensor([1.0, -4.5]), "b": torch.ones(1), "seen": torch.tensor(6)}
    assert differences(ours, theirs, before) == {
        "tensors": 2, "equal_tensors": 1, "largest_difference": 0.5, "largest_difference_in": "a",
        "largest_change_by_training": 4.0,
    }  # fmt: skip


def test_workers_of_two_ranks_train_on_the_batches_of_both() -> None:
    task = contracts.Task(Contract("resist", 4, 2), "cpu", "gloo", width=1 / 16, pixels=8, batch=3)
    (x, y), (other, _) = contracts._batches(task, step=5)
    parts = [contracts.batch_of(task, 5, rank) for rank in (0, 1)]
    assert torch.equal(x, torch.cat([part[0] for part in parts]))
    assert torch.equal(y, torch.cat([part[1] for part in parts]))
    assert not torch.equal(x, other)
    assert not list(contracts.make_network(task).buffers())  # so that splitting a batch has no effect


# Limits, on real processes.


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LEAST_SECONDS", 0.1)


def act(case: tuple[str, Path]) -> dict[str, Any]:
    """Act as a case in its process."""
    what, path = case
    if what == "raise":
        raise RuntimeError(f"in {Path.cwd()}")
    if what == "skip":
        raise limits.Skipped("not here")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        child = os.fork()
        path.write_text(str(child or os.getpid()))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(1, b"begun")
        time.sleep(60)
    return {"value": what}


def test_every_case_has_a_row_whatever_becomes_of_it(briefly: None, tmp_path: Path) -> None:
    wanted = [(what, tmp_path / "pid") for what in ("return", "raise", "skip", "die", "hang")]
    rows = {case[0]: row for case, row in limits.measured(wanted, act, lambda: Allowance(1.0, 9, 9), together=5)}

    assert {what: row["outcome"] for what, row in rows.items()} == {
        "return": "done", "raise": "failed", "skip": "skipped", "die": "failed", "hang": "killed",
    }  # fmt: skip
    assert rows["return"]["value"] == "return"
    assert "RuntimeError: in" in rows["raise"]["reason"]
    assert rows["skip"]["reason"] == "not here"
    assert "-9" in rows["die"]["reason"]
    assert "not done after 1 s; it said last: begun" in rows["hang"]["reason"]
    assert 1 <= rows["hang"]["seconds"] < 3
    assert_gone(int((tmp_path / "pid").read_text()))  # its child, too
    assert "killed" in outcome(rows["hang"])


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # an orphan stays a zombie if the init process does not reap it
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


def test_cases_are_not_begun_without_time_and_never_more_than_so_many_at_a_time(briefly: None, tmp_path: Path) -> None:
    times = iter([9.0, 9.0, 0.0])
    began = time.monotonic()
    found = list(
        limits.measured(
            [("hang", tmp_path / "a"), ("hang", tmp_path / "b"), ("return", tmp_path)],
            act, lambda: Allowance(0.3, 9, next(times)), together=1,
        )
    )  # fmt: skip
    assert [row["outcome"] for _, row in found] == ["killed", "killed", "skipped"]
    assert found[2][1]["reason"] == "no time: 0 s were left to the command"
    assert time.monotonic() - began >= 0.6  # one after the other


def test_who_stops_early_leaves_no_case_running(briefly: None, tmp_path: Path) -> None:
    rows = limits.measured(
        [("hang", tmp_path / "pid"), ("return", tmp_path)], act, lambda: Allowance(30, 30, 30), together=2
    )
    next(rows)
    rows.close()
    if (tmp_path / "pid").exists():
        assert_gone(int((tmp_path / "pid").read_text()))

"""The soak test: a sample of its faults in real trainings, the drawing of faults, and its findings."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.faults import cases, tables, workers
from experiments.faults.cases import SAMPLE, Case
from experiments.faults.continuation import Left, Unbroken, look, same
from experiments.faults.faults import KINDS, PLACES, Fault
from experiments.faults.training import ROUNDS, Settings
from experiments.faults.verdict import findings
from experiments.faults.workers import Ended
from experiments.harness.record import read_record
from resist_lightning.checkpoint.files import write_sealed
from tests.helpers.processes import run_workers
from tests.helpers.programs import run_module

# The sample, over real processes.


def test_a_sample_of_the_soak_finds_nothing(tmp_path: Path) -> None:
    arguments = ["size=sample", f"out={tmp_path}", "timeout_seconds=10"]
    run_module("experiments.faults.run", *arguments, timeout=110)

    content = read_record(tmp_path / "faults.jsonl")
    assert [row["fault"] for row in content["rows"]] == [str(case.fault) for case in SAMPLE]
    assert [row["findings"] for row in content["rows"]] == [[] for _ in SAMPLE]
    assert max(row["seconds"] or 0 for row in content["rows"]) < content["settings"]["limit_seconds"]
    assert (tmp_path / "faults.png").stat().st_size > 10_000


def test_the_sample_has_every_kind_and_every_place() -> None:
    assert {case.fault.kind for case in SAMPLE} == set(KINDS)
    assert {case.fault.place for case in SAMPLE} == set(PLACES)


# Drawing.


def test_two_hundred_faults_have_every_kind_at_every_place() -> None:
    drawn = cases.draw(200, seed=0)

    counts = Counter((case.fault.kind, case.fault.place) for case in drawn)
    assert set(counts) == set(cases.possible())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {case.workers for case in drawn} == {2, 3, 4}
    assert {case.launcher for case in drawn} == {"forked", "popen", "torchrun"}
    assert {case.face for case in drawn} == {"resist", "local_sgd"}
    assert drawn == cases.draw(200, seed=0)
    assert drawn != cases.draw(200, seed=1)


def test_every_fault_can_strike() -> None:
    drawn = [*cases.draw(500, seed=0), *SAMPLE]
    for case in drawn:
        fault = case.fault
        assert fault.worker < case.workers
        assert fault.round < ROUNDS - (fault.place in cases.SYNC)
        if fault.place == "hand_over":
            assert case.face == "resist"
            assert (fault.round, fault.worker) in cases.sending(case.workers)


# Findings.

KILLED = Case(Fault("kill", 1, "hand_over", round=1))
LOST = {
    "type": "WorkerLost",
    "text": f"worker 1 on {socket.gethostname()} was lost. It was last doing: hand-over, round 1, local step 3. "
    "To resume: ckpt_path='a/epoch=1.ckpt'.",
    "at": 2.0,
}
UNNAMED = "not named: the error of worker 0 does not name "
STRUCK = {"at": 1.0, "what": "hand_over", "steps": 6}
GOOD = Ended(["exit code 1", "SIGKILL"], [LOST, None], STRUCK, survived_until=2.0)
FILES = Left("epoch=1", [], 0, equal=True, saved_steps=6)


def changed(**values: Any) -> Ended:
    return dataclasses.replace(GOOD, **values)


def lost(text: str) -> Ended:
    return changed(errors=[{**LOST, "text": text}, None])


def test_a_run_that_ends_as_promised_has_no_findings() -> None:
    assert findings(KILLED, GOOD, FILES, None) == []


@pytest.mark.parametrize(
    ("ended", "left", "resumed", "found"),
    [
        (changed(struck=None), FILES, None, "not tried"),
        (changed(hung=[0], ends=["running", "SIGKILL"]), FILES, None, "hang: worker 0"),
        (changed(left_over=["S", "T"]), FILES, None, "left over: 2 processes, in the states S T"),
        (changed(thawed="running"), FILES, None, "hang: worker 1 still ran after it was thawed"),
        (changed(thawed="exit code 0"), FILES, None, "wrong continuation: worker 1 went on to the end"),
        (changed(ends=["exit code 0", "SIGKILL"], errors=[None, None]), FILES, None, "wrong continuation: worker 0 c"),
        (changed(ends=["SIGABRT", "SIGKILL"], errors=[None, None]), FILES, None, "no error: worker 0 ended with S"),
        (changed(ends=["exit code 1", "SIGABRT"]), FILES, None, "own error: worker 1 ended with SIGABRT"),
        (GOOD, dataclasses.replace(FILES, saved_steps=4), None, "lost work: 2 local steps"),
        (changed(errors=[LOST, LOST]), FILES, None, "own error: worker 1 ended with SIGKILL WorkerLost, not"),
        (changed(errors=[{**LOST, "type": "RuntimeError"}, None]), FILES, None, "other error: worker 0 raised Run"),
        (lost(LOST["text"].replace("worker 1", "a worker")), FILES, None, UNNAMED + "the worker"),
        (lost(LOST["text"].replace("worker 1", "worker 12")), FILES, None, UNNAMED + "the worker"),
        (lost(LOST["text"].replace(socket.gethostname(), "somewhere")), FILES, None, UNNAMED + "its"),
        (lost(LOST["text"].replace("hand-over, ", "")), FILES, None, UNNAMED + "what it"),
        (lost(LOST["text"].partition(" To ")[0]), FILES, None, UNNAMED + "how to"),
        (GOOD, dataclasses.replace(FILES, half_written=["epoch=1.ckpt"]), None, "half-written: epoch=1.ckpt"),
        (GOOD, dataclasses.replace(FILES, equal=False), None, "wrong continuation: a checkpoint is not"),
        (GOOD, FILES, "wrong continuation: from epoch=1 to other weights", "wrong continuation: from epoch=1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(ended: Ended, left: Left, resumed: str | None, found: str) -> None:
    assert [text[: len(found)] for text in findings(KILLED, ended, left, resumed)] == [found]


def test_a_full_disk_may_be_survived_as_set_and_nothing_else() -> None:
    survived = Ended(["exit code 0"] * 2, [None, None], STRUCK, survived_until=2.0)
    disks = [Case(Fault("fill_disk", 1, "saving", round=round)) for round in (1, 2)]

    assert findings(disks[0], survived, FILES, None) == []
    assert findings(disks[1], survived, FILES, None) != []
    error = {
        "type": "CheckpointNotWritten",
        "text": "epoch=2 could not be written (worker 1: File too large)",
        "at": 2.0,
    }
    stopped = Ended(["exit code 1"] * 2, [error] * 2, STRUCK, survived_until=2.0)
    assert findings(disks[1], stopped, FILES, None) == []
    stopped = dataclasses.replace(stopped, errors=[{**error, "text": "no space"}, error])
    assert findings(disks[1], stopped, FILES, None) == [UNNAMED + "the worker"]
    kinds = [text.partition(":")[0] for text in findings(KILLED, survived, FILES, None)]
    assert kinds == ["own error", "wrong continuation"]


def test_a_launcher_that_ends_the_others_must_name_the_worker() -> None:
    case = dataclasses.replace(KILLED, launcher="torchrun")
    ended = changed(ends=["ended", "ended"], errors=[None, None], returncode=1, output="rank: 1 (local_rank: 1)")

    assert findings(case, ended, FILES, None) == []
    ended = dataclasses.replace(ended, returncode=0, output="failed")
    assert [text.partition(":")[0] for text in findings(case, ended, FILES, None)] == [
        "wrong continuation",
        "not named",
    ]


def test_all_end_together_after_a_signal() -> None:
    for kind, type, end in (
        ("terminate", "SIGTERMException", "exit code 143"),
        ("interrupt", "SystemExit", "exit code 1"),
    ):
        case = Case(Fault(kind, 1, "local steps", round=1))
        asked = {"type": type, "text": "", "at": 2.0}
        ended = Ended([end] * 2, [asked, asked], STRUCK, survived_until=2.0)

        assert findings(case, ended, FILES, None) == []
        assert (
            findings(dataclasses.replace(KILLED), dataclasses.replace(ended, errors=[asked, None]), FILES, None) != []
        )
        launched = dataclasses.replace(ended, ends=["ended"] * 2, returncode=0, output="worker 1")
        assert findings(dataclasses.replace(case, launcher="popen"), launched, FILES, None) == [
            "wrong continuation: the launcher ended with exit code 0"
        ]


# Files and processes left behind.


def test_files_are_read_and_compared(tmp_path: Path) -> None:
    saved = {"global_step": 3, "callbacks": {"folder": "there"}, "state_dict": {"weight": torch.ones(2)}}
    own = [{"weight": torch.zeros(2)}]
    unbroken = Unbroken({"epoch=0": {**saved, "own": own}, "epoch=1": {**saved, "own": own, "global_step": 6}}, {})
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    assert look(tmp_path, unbroken) == Left(None, [], 0, True, 0)

    beside = write_sealed(own[0], folder / "epoch=0.ckpt.workers", "0-of-1")
    state = {"resist_lightning": {"files": [beside.name]}}
    unbroken.checkpoints["epoch=0"].update(resist_lightning={"files": ["another name"]})
    torch.save({**saved, **state, "callbacks": {"folder": "here"}}, folder / "epoch=0.ckpt")
    (folder / "epoch=1.ckpt").write_bytes((folder / "epoch=0.ckpt").read_bytes()[:500])
    (tmp_path / "tmp" / "piece").touch()
    assert look(tmp_path, unbroken) == Left("epoch=0", ["epoch=1.ckpt"], 1, True, 3)

    torch.save({**saved, "global_step": 6, "state_dict": {"weight": torch.zeros(2)}}, folder / "epoch=1.ckpt")
    assert look(tmp_path, unbroken) == Left("epoch=1", [], 1, False, 6)

    beside.unlink()
    assert look(tmp_path, unbroken).half_written == ["epoch=0.ckpt"]


def test_the_same_means_bit_for_bit() -> None:
    one = {"a": [torch.tensor([1.0]), 1, "x"], "b": None}
    assert same(one, {"a": [torch.tensor([1.0]), 1, "x"], "b": None})
    assert not same(one, {"a": [torch.tensor([1.0 + 2**-23]), 1, "x"], "b": None})
    assert not same(one, {"a": [torch.tensor([1.0], dtype=torch.float64), 1, "x"], "b": None})
    assert not same(one, {"a": [torch.tensor([1.0]), 1], "b": None})
    assert not same(one, {"a": [torch.tensor([1.0]), True, "x"], "b": None})
    assert not same(one, {"a": [torch.tensor([1.0]), 1, "x"]})


def test_stopped_processes_and_grandchildren_are_seen() -> None:
    before = set(workers.descendants())
    shell = subprocess.Popen(["sh", "-c", "sleep 60; true"])
    try:
        while len(started := set(workers.descendants()) - before) < 2:
            assert shell.poll() is None
        assert shell.pid in started
        os.kill(shell.pid, signal.SIGSTOP)
        os.waitpid(shell.pid, os.WUNTRACED)
        assert workers.state(shell.pid) == "T"
    finally:
        for pid in set(workers.descendants()) - before:
            os.kill(pid, signal.SIGKILL)
        shell.wait()
    assert workers.state(shell.pid) == ""


def run_beside_threads(_: int, folder: str) -> None:
    workers.run_training(Settings("resist", 2, 1, 1), Path(folder, "run"), limit=1)


def test_a_process_with_threads_is_not_forked(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="threads, but a process to fork may have only one; set OMP_NUM_THREADS=1"):
        run_workers(run_beside_threads, 1, str(tmp_path))  # gloo's threads


def test_settings_travel(tmp_path: Path) -> None:
    settings = Settings("resist", 3, 20.0, 3.0, Fault("kill", 1, "saving", round=2))
    settings.write(tmp_path)
    assert Settings.read(tmp_path) == settings


# The tables.


def test_records_of_different_seeds_are_joined() -> None:
    one = {"machine": {}, "settings": {"seed": 0, "silence_seconds": 3}, "seconds": 5, "rows": [{"fault": "a"}]}
    other = {**one, "settings": {"seed": 1, "silence_seconds": 3}, "seconds": 7, "rows": [{"fault": "b"}]}

    content = tables.joined([one, other])
    assert (content["seconds"], content["settings"]["seed"], content["at_a_time"]) == (7, [0, 1], 2)
    assert len(content["rows"]) == 2
    with pytest.raises(ValueError, match="the same faults would be counted twice"):
        tables.joined([one, one])
    with pytest.raises(ValueError, match="different silence_seconds cannot be joined"):
        tables.joined([one, {**other, "settings": {"seed": 1, "silence_seconds": 4}}])

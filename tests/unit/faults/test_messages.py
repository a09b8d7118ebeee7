from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from resist_lightning.faults.messages import Heartbeat, Process, Report, make_report, parse, to_line

HEARTBEAT = Heartbeat(7, end="failed", text='ValueError: "ü"\n', seconds=1.5)


@pytest.mark.parametrize(
    "message",
    [HEARTBEAT, Report(3, silent=True, quiet_text="ü"), Process(3, "alpha", "alpha/boot", 12, members=2)],
    ids=["heartbeat", "report", "process"],
)
def test_a_message_can_be_posted_and_read(message: Heartbeat | Report | Process) -> None:
    assert parse(type(message), to_line(message)) == message


def test_a_heartbeat_of_a_newer_version_can_be_read() -> None:
    line = json.dumps({**asdict(HEARTBEAT), "what": "dreaming", "mood": ["new"], "seconds": 2})
    assert parse(Heartbeat, line) == replace(HEARTBEAT, what="dreaming", seconds=2.0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "not json",
        "[" * 100_000,
        "5",
        json.dumps({**asdict(HEARTBEAT), "seconds": "long"}),
        json.dumps({**asdict(HEARTBEAT), "beat": True}),
        json.dumps({**asdict(HEARTBEAT), "end": ["failed"]}),
    ],
    ids=["empty", "text", "deep", "number", "type", "truth", "list"],
)
def test_what_is_no_heartbeat_is_ignored(line: str) -> None:
    assert parse(Heartbeat, line) is None


def test_a_message_in_parts_is_none() -> None:
    assert parse(Process, '{"worker": 1}') is None


def test_a_report_does_not_grow_with_the_number_of_workers() -> None:
    def report(workers: int) -> Report:
        processes = [Process(worker, "alpha", "alpha", 100_000 + worker) for worker in range(workers)]
        heartbeats = dict.fromkeys(range(workers), Heartbeat(1, doing="averaging, round 1, local step 50"))
        return make_report(1, processes[0], None, None, heartbeats, processes, ())

    assert report(4096).doing.endswith("; and 4088 more")
    assert len(to_line(report(4096))) < len(to_line(report(9))) + 10

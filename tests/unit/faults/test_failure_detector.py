from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from resist_lightning.faults.failure_detector import (
    NAP_SECONDS,
    FailureDetector,
    Heartbeat,
    Verdict,
    is_broken_connection,
    name_of_exit,
    read_heartbeat,
)

SILENCE = 30.0
HOSTS = ("alpha", "beta", "beta")
FIRST = [Heartbeat(worker, host, home=host, pid=100 + worker) for worker, host in enumerate(HOSTS)]


def detector_of(worker: int = 0) -> FailureDetector:
    return FailureDetector(FIRST[worker], 3, SILENCE, "the store at alpha:1", now=0.0)


def beats(
    detector: FailureDetector, seconds: int, start: int = 0, silent: tuple[int, ...] = (), **fields: object
) -> None:
    """Everybody but ``silent`` posts a heartbeat each second."""
    for second in range(start, start + seconds):
        detector.wake(second)
        heartbeats = [
            replace(heartbeat, beat=second, **fields) for heartbeat in FIRST if heartbeat.worker not in silent
        ]  # type: ignore[arg-type]
        detector.hear(heartbeats, second)


def test_a_heartbeat_can_be_posted_and_read():
    heartbeat = replace(FIRST[1], end="failed", text='ValueError: "ü"\n', seconds=1.5)
    assert read_heartbeat(heartbeat.write().encode(), 1) == heartbeat
    assert read_heartbeat(replace(heartbeat, seconds=2).write().encode(), 1) == replace(heartbeat, seconds=2.0)


def test_a_heartbeat_of_a_newer_version_can_be_read():
    line = json.dumps({**asdict(FIRST[1]), "what": "dreaming", "mood": ["new"]}).encode()
    assert read_heartbeat(line, 1) == replace(FIRST[1], what="dreaming")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"\xff\x00\x80",
        b"[" * 100_000,
        b"5",
        b'{"worker": 1}',
        json.dumps({**asdict(FIRST[1]), "seconds": "long"}).encode(),
        json.dumps({**asdict(FIRST[1]), "pid": True}).encode(),
        json.dumps({**asdict(FIRST[1]), "end": ["failed"]}).encode(),
        json.dumps({**asdict(FIRST[1]), "text": "x" * 1_000_000}).encode(),
        FIRST[2].write().encode(),
    ],
    ids=["empty", "text", "binary", "deep", "number", "parts", "type", "truth", "list", "huge", "of another worker"],
)
def test_what_is_no_heartbeat_of_the_worker_is_ignored(line: bytes):
    assert read_heartbeat(line, 1) is None


def test_nobody_is_lost_while_all_post_heartbeats():
    detector = detector_of()
    beats(detector, 100)
    assert detector.judge(99.5, {}) is None


def test_silence_counts_up_to_the_last_reading_and_names_the_worker():
    detector = detector_of()
    beats(detector, 10, doing="averaging, round 2, local step 50")
    beats(detector, 31, start=10, silent=(1,))
    assert detector.judge(40, {}) == Verdict(
        "worker 1 (host beta, pid 101) has not been heard of for 31 s: it is frozen, or its host cannot be reached. "
        "Worker 1 was last doing: averaging, round 2, local step 50.",
        worker=1,
    )
    assert detector_of().judge(29, {}) is None


def test_only_a_silent_worker_of_this_host_is_given_to_be_killed():
    detector = detector_of(worker=2)
    beats(detector, 1)
    beats(detector, 32, start=1, silent=(1,))
    verdict = detector.judge(32, {})
    assert verdict is not None
    assert verdict.frozen == 101


def test_a_worker_that_never_posted_a_heartbeat_is_lost_too():
    detector = detector_of()
    beats(detector, 40, silent=(2,))
    assert detector.judge(40, {}) == Verdict("worker 2 has not been heard of since the start, 39 s ago.", worker=2)


def test_a_store_that_does_not_answer_counts_as_lost():
    detector = detector_of(worker=1)
    beats(detector, 5)
    for second in range(5, 40):
        detector.wake(second)
    verdict = detector.judge(39, {})
    assert verdict is not None
    assert verdict.text.startswith("the store at alpha:1 has not answered for 35 s. Most likely lost: worker 0 (host")


def test_a_nap_of_this_worker_is_not_held_against_the_others():
    detector = detector_of()
    beats(detector, 5)
    detector.wake(100.0)
    assert detector.judge(100.0, {}) is None
    assert NAP_SECONDS > 2


def test_the_cause_comes_before_its_consequences():
    detector = detector_of()
    beats(detector, 1)
    detector.hear([replace(FIRST[2], end="gave up", text="worker 1 is lost")], 1)
    assert detector.judge(1, {}) == Verdict("worker 1 is lost")
    detector.hear([replace(FIRST[1], end="failed", text="KeyError: 1.", doing="saving, round 1, local step 0")], 2)
    assert detector.judge(2, {}) == Verdict(
        "worker 1 (host beta, pid 101) failed with KeyError: 1. "
        "Worker 1 was last doing: saving, round 1, local step 0.",
        worker=1,
    )


def test_a_process_that_is_gone_counts_after_a_second_look_unless_it_had_finished():
    detector = detector_of()
    beats(detector, 1)
    gone = {1: "was ended by signal 9 (SIGKILL)"}
    assert detector.judge(1.0, gone) is None
    assert [heartbeat.worker for heartbeat in detector.running()] == [2]
    verdict = detector.judge(2.5, gone)
    assert verdict is not None
    assert verdict.text.startswith("worker 1 (host beta, pid 101) was ended by signal 9 (SIGKILL). Worker 1 was last")
    detector.hear([replace(FIRST[1], end="done")], 2.6)
    assert detector.judge(3, gone) is None


def test_a_worker_that_is_gone_is_named_rather_than_the_process_that_started_this_one():
    detector = detector_of(worker=1)
    beats(detector, 1)
    gone = {0: "ended without a word"}
    assert detector.judge(1, gone, "the parent has ended") is None
    assert (detector.judge(2.5, gone, "the parent has ended") or Verdict("")).worker == 0
    assert detector_of().judge(1, {}, "the parent has ended") is None
    orphan = detector_of()
    orphan.judge(1, {}, "the parent has ended")
    assert orphan.judge(4, {}, "the parent has ended") == Verdict("the parent has ended")


def test_a_worker_that_lives_but_does_not_come_is_named_with_what_it_does():
    detector = detector_of()
    detector.hear([replace(FIRST[1], what="handshake", round=3, doing="handshake")], 1)
    detector.hear([replace(FIRST[2], what="local steps", round=2, step=7, doing="local steps, round 2", seconds=62)], 1)
    assert detector.suspect("Timed out waiting 600000ms for recv", 600, 3).text == (
        "worker 2 (host beta, pid 102) is alive, but has not come to the handshake for 600 s: it is still in "
        "local steps, round 2, since 62 s."
    )
    broken = detector.suspect("Connection closed by peer.\nIn a second line", 600, 3).text
    assert broken.startswith("a connection between the workers broke or timed out (Connection closed by peer), and no ")
    for named in (
        "worker 1 (host",
        "handshake;",
        "worker 2 (host beta, pid 102): local steps, round 2",
        "all of them",
    ):
        assert named in broken


def test_of_a_broken_connection_the_one_that_is_silent_is_suspected():
    detector = detector_of()
    beats(detector, 2)
    beats(detector, 5, start=2, silent=(2,))
    assert detector.suspect("Connection closed by peer", 600, 3).worker == 2


def test_a_failure_is_heard_when_all_others_that_run_have_read_since():
    detector = detector_of()
    beats(detector, 2)
    at = {heartbeat.worker: heartbeat.beat for heartbeat in detector.running()}
    assert not detector.heard(at, None)
    beats(detector, 2, start=2, silent=(2,))
    assert not detector.heard(at, None)
    assert detector.heard(at, Verdict("", worker=2))


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:16308", True),
        ("Timed out waiting 8000ms for recv operation to complete", True),
        ("NCCL communicator was aborted", True),
        ("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error", True),
        ("ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'", False),
        ("NCCL error: invalid usage. Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000", False),
        ("mat1 and mat2 shapes cannot be multiplied (8x3 and 4x3)", False),
    ],
)
def test_errors_of_connections_are_told_from_the_users(text: str, broken: bool):
    assert is_broken_connection(text) == broken


def test_exits_have_names():
    assert name_of_exit(-11) == "was ended by signal 11 (SIGSEGV)"
    assert name_of_exit(3) == "ended with exit code 3 without a word"
    assert name_of_exit(-999) == "was ended by signal 999"

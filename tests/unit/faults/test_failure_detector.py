from __future__ import annotations

from dataclasses import replace

import pytest

from resist_lightning.faults.failure_detector import NAP_SECONDS, FailureDetector
from resist_lightning.faults.messages import Heartbeat, Process, Report, Verdict

SILENCE = 30.0
# Workers 0 and 1 are the monitors; worker 2 has worker 1 for a neighbour.
PROCESSES = [Process(worker, host, host, 100 + worker) for worker, host in enumerate(("alpha", "beta", "beta"))]
SILENT_0 = "worker 0 (host alpha, pid 100) has sent no heartbeat for {} s: it is frozen, or its host cannot be reached."


def detector_of(worker: int = 0, processes: list[Process] = PROCESSES) -> FailureDetector:
    detector = FailureDetector(worker, processes, SILENCE, "the store at alpha:1", now=0.0)
    detector.note_own(Heartbeat(), 0.0)
    return detector


def beats(
    detector: FailureDetector, seconds: int, start: int = 0, silent: tuple[int, ...] = (), **fields: object
) -> None:
    """All workers but ``silent`` post a heartbeat each second, and the monitors among them a report."""
    for second in range(start, start + seconds):
        detector.wake(second)
        heartbeat = Heartbeat(second + 1, **fields)  # type: ignore[arg-type]
        posted = {worker: heartbeat for worker in detector.wanted() if worker not in silent}
        reports = {monitor: Report(second + 1) for monitor in (0, 1) if monitor not in silent}
        detector.hear(posted, second, reports)


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_nobody_is_lost_while_all_post_heartbeats(worker: int) -> None:
    detector = detector_of(worker)
    beats(detector, 100)
    assert detector.judge(99.5, {}) is None


def test_only_monitors_read_heartbeats_and_others_those_of_neighbours_that_are_gone() -> None:
    assert [detector_of(worker).wanted() for worker in range(3)] == [[1, 2], [0, 2], []]
    last = detector_of(2)
    last.judge(1, {1: "ended without reporting an error"})
    assert last.wanted() == [1]


def test_silence_counts_up_to_the_last_reading_and_names_the_worker() -> None:
    detector = detector_of()
    beats(detector, 10, doing="averaging, round 2, local step 50")
    beats(detector, 31, start=10, silent=(1,))
    assert detector.judge(40, {}) == Verdict(
        "worker 1 (host beta, pid 101) has sent no heartbeat for 31 s: it is frozen, or its host cannot be reached. "
        "Worker 1 was last doing: averaging, round 2, local step 50.",
        worker=1,
        silent=True,
    )
    assert detector_of().judge(29, {}) is None


def test_a_verdict_that_a_monitor_publishes_is_everybodys() -> None:
    monitor = detector_of()
    beats(monitor, 10)
    beats(monitor, 32, start=10, silent=(1,))
    verdict = monitor.judge(42, {})
    assert verdict is not None
    report = monitor.report(42, verdict)

    for worker, frozen in ((1, 101), (2, 101)):  # it can be killed only on its own host
        detector = detector_of(worker)
        detector.hear({}, 42, {0: report})
        assert detector.judge(42, {}) == replace(verdict, frozen=frozen)
    elsewhere = detector_of(2, [*PROCESSES[:2], Process(2, "gamma", "gamma", 102)])
    elsewhere.hear({}, 42, {0: report})
    assert elsewhere.judge(42, {}) == verdict
    assert verdict.frozen == 0


def test_a_monitor_that_is_frozen_is_named_by_the_other_one_within_the_same_time() -> None:
    second = detector_of(1)
    beats(second, 10)
    beats(second, 31, start=10, silent=(0,))
    verdict = second.judge(40, {})
    assert verdict is not None
    assert verdict.text.startswith(SILENT_0.format(31))

    worker = detector_of(2)
    beats(worker, 10)
    beats(worker, 31, start=10, silent=(0,))
    assert worker.judge(40, {}) is None  # the second monitor decides this
    worker.hear({}, 41, {1: second.report(99, verdict)})
    assert worker.judge(41, {}) == verdict


def test_where_both_monitors_are_frozen_every_worker_names_one_of_them_by_itself() -> None:
    worker = detector_of(2)
    beats(worker, 10)
    beats(worker, 31, start=10, silent=(0, 1))
    assert worker.judge(40, {}) == Verdict(SILENT_0.format(31), worker=0, silent=True)


def test_a_monitor_that_has_ended_in_good_order_is_not_missed() -> None:
    worker = detector_of(2)
    worker.hear({}, 1, {0: Report(1, end="done"), 1: Report(1)})
    beats(worker, 40, start=1, silent=(0, 1))
    verdict = worker.judge(40, {})
    assert verdict is not None
    assert verdict.worker == 1  # the silent one
    worker.hear({}, 41, {1: Report(2, end="done")})
    assert worker.judge(80, {}) != verdict


def test_a_worker_that_never_posted_a_heartbeat_is_lost_too() -> None:
    detector = detector_of()
    beats(detector, 40, silent=(2,))
    text = "worker 2 (host beta, pid 102) has sent no heartbeat since the start, 39 s ago."
    assert detector.judge(40, {}) == Verdict(text, worker=2, silent=True)


def test_a_store_that_does_not_answer_counts_as_lost_unless_the_workers_come_to_syncs() -> None:
    detector = detector_of(worker=1)
    beats(detector, 5)
    for second in range(5, 40):
        detector.wake(second)
    verdict = detector.judge(39, {})
    assert verdict is not None
    assert verdict.text.startswith("the store at alpha:1 has not answered for 35 s. Most likely lost: worker 0 (host")
    # A stranger may have blocked the store, which the training no longer needs.
    detector.note_own(Heartbeat(6, round=1), 39)
    assert detector.judge(39, {}) is None
    assert detector.judge(39 + SILENCE + 1, {}) is not None


def test_a_nap_of_this_worker_is_not_held_against_the_others() -> None:
    detector = detector_of()
    beats(detector, 5)
    detector.wake(100.0)
    assert detector.judge(100.0, {}) is None
    assert NAP_SECONDS > 2


def test_what_strangers_write_in_a_workers_place_neither_makes_it_silent_nor_alive() -> None:
    detector = detector_of()
    beats(detector, 10)
    for second in range(10, 100):
        detector.hear({2: Heartbeat(second + 1)}, second, tampered={1})
    assert detector.judge(100, {}) is None
    # An old line that a stranger writes again and again.
    for second in range(100, 200):
        detector.hear({1: Heartbeat(3), 2: Heartbeat(second + 1)}, second)
    assert detector.judge(200, {}) is None
    assert detector.heartbeats[1].beat == 10
    # The worker's last line, unchanged: it is silent.
    for second in range(200, 232):
        detector.hear({1: Heartbeat(10), 2: Heartbeat(second + 1)}, second)
    assert (detector.judge(232, {}) or Verdict("")).worker == 1


def test_the_cause_comes_before_its_consequences() -> None:
    detector = detector_of()
    beats(detector, 1)
    detector.hear({2: Heartbeat(5, end="gave up", text="worker 1 is lost", lost=1)}, 1)
    assert detector.judge(1, {}) == Verdict("worker 1 is lost", worker=1)
    failed = Heartbeat(5, end="failed", text="KeyError: 1.", doing="saving, round 1, local step 0")
    detector.hear({1: failed}, 2)
    assert detector.judge(2, {}) == Verdict(
        "worker 1 (host beta, pid 101) failed with KeyError: 1. "
        "Worker 1 was last doing: saving, round 1, local step 0.",
        worker=1,
    )


def test_what_one_worker_sees_on_its_host_reaches_the_others_while_it_still_runs() -> None:
    monitor = detector_of()
    beats(monitor, 1)
    monitor.hear({2: Heartbeat(5, text="worker 1 ended without reporting an error.", lost=1)}, 1)
    assert monitor.judge(1, {}) == Verdict("worker 1 ended without reporting an error.", worker=1)


def test_a_monitor_reports_its_own_failure() -> None:
    detector = detector_of()
    detector.note_own(Heartbeat(3, end="failed", text="KeyError: 1.", doing="saving, round 1, local step 0"), 1)
    report = detector.report(3, None)
    assert report.verdict.startswith("worker 0 (host alpha, pid 100) failed with KeyError: 1. Worker 0 was last doing")
    assert (report.lost, report.end) == (0, "failed")


@pytest.mark.parametrize("worker", [0, 2])
def test_a_process_that_is_gone_counts_after_a_second_look_unless_it_had_finished(worker: int) -> None:
    here = [replace(process, home="one host") for process in PROCESSES]
    detector = detector_of(worker, here)
    beats(detector, 1)
    gone = {1: "was killed by signal 9 (SIGKILL)"}
    assert detector.judge(1.0, gone) is None
    beats(detector, 1, start=1)
    verdict = detector.judge(2.5, gone)
    assert verdict is not None
    assert verdict.text.startswith("worker 1 (host beta, pid 101) was killed by signal 9 (SIGKILL). Worker 1 was last")
    detector.hear({1: Heartbeat(9, end="done")}, 2.6)
    assert detector.judge(3, gone) is None


def test_a_worker_that_is_gone_is_named_rather_than_the_process_that_started_this_one() -> None:
    detector = detector_of(worker=1)
    beats(detector, 1)
    gone = {2: "ended without reporting an error"}
    assert detector.judge(1, gone, "the parent has ended") is None
    assert (detector.judge(2.5, gone, "the parent has ended") or Verdict("")).worker == 2
    assert detector_of().judge(1, {}, "the parent has ended") is None
    orphan = detector_of()
    orphan.judge(1, {}, "the parent has ended")
    assert orphan.judge(4, {}, "the parent has ended") == Verdict("the parent has ended")


@pytest.mark.parametrize("worker", [0, 2])
def test_a_worker_that_lives_but_does_not_come_is_named_with_what_it_does(worker: int) -> None:
    monitor = detector_of()
    monitor.note_own(Heartbeat(1, what="handshake", round=3, doing="handshake"), 1)
    late = Heartbeat(1, what="local steps", round=2, step=7, doing="local steps, round 2", seconds=62)
    monitor.hear({1: late, 2: Heartbeat(1, what="handshake", round=3, doing="handshake")}, 1)
    detector = detector_of(worker)
    detector.hear({}, 1, {0: monitor.report(1, None)})
    assert detector.suspect("Timed out waiting 600000ms for recv", 600).text == (
        "worker 1 (host beta, pid 101) is alive, but has not reached the handshake for 600 s: it is still in "
        "local steps, round 2, since 62 s."
    )
    broken = detector.suspect("Connection closed by peer.\nIn a second line", 600).text
    assert broken.startswith("a connection between the workers broke or timed out (Connection closed by peer), and no ")
    for named in (
        "worker 2 (host beta, pid 102): handshake",
        "worker 1 (host beta, pid 101): local steps",
        "all workers",
    ):
        assert named in broken


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_of_a_broken_connection_the_one_that_is_silent_is_suspected(worker: int) -> None:
    monitor, silent = detector_of(), 2 if worker != 2 else 1
    beats(monitor, 2)
    beats(monitor, 5, start=2, silent=(silent,))
    detector = detector_of(worker)
    beats(detector, 2)
    beats(detector, 5, start=2, silent=(silent,))
    detector.hear({}, 7, {0: monitor.report(99, None)})
    assert detector.suspect("Connection closed by peer", 600).worker == silent


def test_a_failure_is_heard_when_all_others_that_run_have_read_the_report() -> None:
    detector = detector_of()
    assert not detector.have_read(3, None)
    detector.hear({1: Heartbeat(1, read=3), 2: Heartbeat(1, read=2)}, 1)
    assert not detector.have_read(3, None)
    assert detector.have_read(3, Verdict("", worker=2))
    detector.hear({2: Heartbeat(2, read=2, end="gave up")}, 1)
    assert detector.have_read(3, None)

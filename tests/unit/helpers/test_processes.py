"""The helper that starts workers: values come back in order, failures are named, no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import leaks
from tests.helpers.processes import WorkerDied, WorkersTimedOut, run_workers, run_workers_to_the_end


def group_facts(worker, offset):
    total = torch.tensor([worker + offset])
    dist.all_reduce(total)
    return worker, dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_value_of_each_worker_in_order(workers):
    total = sum(range(workers)) + 10 * workers
    assert run_workers(group_facts, workers, 10) == [(w, w, workers, total, 1) for w in range(workers)]


def session_facts(worker):
    return os.getsid(0), os.getpid(), os.environ.get("A_VARIABLE"), Path.cwd()


def test_each_worker_has_a_session_and_the_environment_of_now(monkeypatch, tmp_path):
    for value in ("first", "second"):  # the fork server was started without either
        monkeypatch.setenv("A_VARIABLE", value)
        facts = run_workers(session_facts, 2)
        assert [(session == pid, variable) for session, pid, variable, _ in facts] == [(True, value)] * 2
        assert [folder for *_, folder in facts] == [Path.cwd()] * 2
    assert os.getpid() not in {session for session, *_ in facts}


def big_tensor(worker):
    return torch.full((1_000_000,), worker)


def test_values_may_be_larger_than_a_pipe():
    assert [(int(value.sum()), value.numel()) for value in run_workers(big_tensor, 2)] == [
        (0, 10**6),
        (10**6, 10**6),
    ]


def raise_in_one(worker):
    if worker == 1:
        raise KeyError("no such block")
    dist.barrier()  # fails when worker 1 leaves


def test_first_exception_wins():
    with pytest.raises(KeyError, match="no such block") as caught:
        run_workers(raise_in_one, 3)
    assert "worker 1 of 3:\nTraceback" in str(caught.value.__cause__)
    assert "in raise_in_one\n" in str(caught.value.__cause__)


def raise_in_turn(worker):
    time.sleep((0.1, 0.0)[worker])
    raise ValueError(f"from worker {worker}")


def test_first_means_first_in_time():
    with pytest.raises(ValueError, match="from worker 1") as caught:
        run_workers(raise_in_turn, 2)
    assert "afterwards, worker 0 raised ValueError: from worker 0" in str(caught.value.__cause__)


class Unpicklable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def raise_unpicklable(worker):
    raise Unpicklable("this", "that")


def return_unpicklable(worker):
    return lambda: None


def test_what_cannot_be_pickled_is_still_told():
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"):
        run_workers(raise_unpicklable, 1)
    with pytest.raises(Exception, match=r"pickle.*return_unpicklable"):
        run_workers(return_unpicklable, 1)


def die(worker, how):
    if worker == 0:
        os._exit(3) if how == "exit" else os.kill(os.getpid(), how)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "name"),
    [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV"), ("exit", "exit code 3")],
    ids=str,
)
def test_a_death_is_named_and_wins_over_its_consequences(how, name):
    with pytest.raises(WorkerDied, match=f"^worker 0 ended with {name}, before it returned"):
        run_workers(die, 2, how)


def hang(worker, notes):
    child = subprocess.Popen(["sleep", "60"])
    Path(notes, str(worker)).write_text(str(child.pid))
    if worker == 1:
        time.sleep(60)
    dist.barrier()


def test_a_hang_is_killed_at_the_timeout_with_all_it_started(tmp_path):
    begin = time.monotonic()
    with pytest.raises(WorkersTimedOut) as caught:
        run_workers(hang, 2, str(tmp_path), timeout=2.0)
    assert time.monotonic() - begin < 30  # and not the minute that it would sleep
    message = str(caught.value)
    assert message.startswith("2 of 2 workers still ran after 2 s and were killed")
    assert message.count("in hang") == 2
    assert "in barrier" in message.split("worker 1:", maxsplit=1)[0]
    assert [int(path.read_text()) in leaks.session_processes() for path in tmp_path.iterdir()] == [
        False,
        False,
    ]


def leave_a_child(worker, notes):
    Path(notes, str(worker)).write_text(str(subprocess.Popen(["sleep", "60"]).pid))


def test_what_a_worker_forgot_is_ended_too(tmp_path):
    run_workers(leave_a_child, 2, str(tmp_path))
    children = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(children) == 2
    time.sleep(0.05)
    assert not set(children) & set(leaks.session_processes())


def test_to_the_end_tells_of_everyone():
    outcomes = run_workers_to_the_end(die, 2, signal.SIGKILL)
    assert [outcome.end for outcome in outcomes] == ["SIGKILL", "exit code 1"]
    assert outcomes[0].error is None
    assert isinstance(outcomes[1].error, RuntimeError)
    assert "in die" in outcomes[1].traceback


def test_to_the_end_has_a_timeout_too(tmp_path):
    with pytest.raises(WorkersTimedOut, match="1 of 2 workers still ran"):
        run_workers_to_the_end(hang_one, 2, timeout=1.0)


def hang_one(worker):
    if worker == 1:
        time.sleep(60)
    dist.destroy_process_group()


def wait_for_peer(worker):
    if worker == 0:
        dist.barrier()
    else:
        time.sleep(60)


def test_collectives_may_have_a_timeout_of_their_own():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
        run_workers(wait_for_peer, 2, collective_timeout=1.0)
    assert time.monotonic() - begin < 30  # and not the minute that it would sleep


def test_workers_die_with_the_session(root):
    """A killed session cannot clean up; its workers notice it themselves."""
    script = (
        "import os, sys, threading, time\n"
        "from multiprocessing import get_context\n"
        "from tests.helpers.leaks import die_with_parent\n"
        "def worker():\n"
        "    os.setsid()\n"
        "    threading.Thread(target=die_with_parent, daemon=True).start()\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "get_context('fork').Process(target=worker).start()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root) as session:
        worker = int(session.stdout.readline())
        assert worker in leaks.session_processes()
        session.kill()
    deadline = time.monotonic() + 5
    while worker in leaks.session_processes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker not in leaks.session_processes()

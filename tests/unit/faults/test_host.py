from __future__ import annotations

import os
import subprocess
import sys

import pytest

from resist_lightning.faults.host import is_alive, this_process


def test_a_process_that_has_ended_is_not_alive_before_its_parent_has_noticed_either() -> None:
    assert is_alive(os.getpid())
    child = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert not is_alive(child.pid)
    finally:
        child.wait()
    assert not is_alive(child.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names for boots")
def test_a_process_is_introduced_with_what_tells_its_host_from_others() -> None:
    own = this_process(3, members=2)
    assert (own.worker, own.pid, own.members) == (3, os.getpid(), 2)
    assert own.home.count("/") == 2
    assert own.name == f"worker 1 (rank 3) (host {own.host}, pid {own.pid})"

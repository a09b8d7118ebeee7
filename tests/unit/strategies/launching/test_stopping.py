from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from resist_lightning.strategies.launching.stopping import Forwarder

WORKERS: Any = [SimpleNamespace(pid=7, is_alive=lambda: False), SimpleNamespace(pid=8, is_alive=lambda: True)]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SIGTERMException)])
def test_workers_that_do_not_stop_within_the_limit_are_named_and_waited_for_no_more(
    number: signal.Signals, error: type[BaseException], capfd: Any
) -> None:
    passed_on: list[int] = []
    forwarder = Forwarder(passed_on.append, limit=0.0, first_rank=4)  # on the third of several hosts

    def wait() -> None:
        with forwarder.waiting(None):
            forwarder.check(WORKERS)
            os.kill(os.getpid(), number)
            assert passed_on == [number]
            forwarder.check(WORKERS)

    with pytest.raises(error):
        wait()
    assert f"worker 5 (pid 8): still running 0 s (timeout=) after {number.name}" in capfd.readouterr().err


def test_workers_have_until_the_limit_to_end_their_round() -> None:
    forwarder = Forwarder(lambda _: None, limit=60.0)
    with forwarder.waiting(None):
        os.kill(os.getpid(), signal.SIGINT)
        forwarder.check(WORKERS)

"""``Trainer(strategy="auxnet")``: whatever happens to one worker, no other waits forever for its messages."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import pytest

from resist_lightning import NotFinite, WorkerLost
from tests.helpers import dying
from tests.helpers.auxnet import CUTS, GUESSES, LATE, SERIAL, fit_stages, pictures
from tests.helpers.plain import Classifier
from tests.helpers.trainers import run_trainers_to_the_end
from tests.helpers.worker import Outcome

PATIENCE_SECONDS = 60
NAME = r"worker {} \(host .+, pid \d+\) "
AT_STEP = 7

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS + 30)


class Harmed(Classifier):
    """One worker fails in a step: before its forward, its backward, or its optimizer step."""

    def __init__(self, what: str, where: str, doomed: int) -> None:
        super().__init__("chain")
        self.what, self.where, self.doomed = what, where, doomed

    def meet(self, where: str, batch_idx: int) -> None:
        if (where, self.global_step, self.global_rank) == (self.where, AT_STEP, self.doomed):
            dying.HARMS[self.what]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.meet("forward", batch_idx)
        loss = super().training_step(batch, batch_idx)
        self.meet("backward", batch_idx)
        return loss

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.meet("step", 0)


def train(worker: int, what: str, where: str, doomed: int, how: dict[str, Any], workers: int, timeout: float) -> None:
    strategy = {
        **how,
        "cuts": CUTS[workers],
        "silence": timedelta(seconds=3),
        "timeout": timedelta(seconds=timeout),
    }
    fit_stages(worker, Harmed(what, where, doomed), strategy, pictures(samples=400))


def harm(what: str, where: str, doomed: int, how: dict[str, Any], workers: int = 2, timeout: float = 30) -> Any:
    began = time.monotonic()
    arguments = what, where, doomed, how, workers, timeout
    outcomes = run_trainers_to_the_end(train, workers, *arguments, timeout=PATIENCE_SECONDS)
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    return outcomes


def assert_lost(outcome: Outcome, worker: int, how: str) -> None:
    assert isinstance(outcome.error, WorkerLost), outcome
    assert re.match(NAME.format(worker) + how, str(outcome.error)), outcome.error


@pytest.mark.parametrize(
    ("where", "doomed", "workers", "how"),
    [
        ("forward", 2, 3, LATE),  # the others wait for the network's output
        ("backward", 1, 2, LATE),  # the other waits for a late gradient
        ("backward", 1, 2, GUESSES),
        ("step", 0, 2, GUESSES),  # the other waits for the truth
        ("backward", 1, 2, SERIAL),  # the other waits for a gradient, inside its backward pass
        ("forward", 0, 3, SERIAL),  # worker 1 waits for the truth, and worker 2 for worker 1
    ],
)
def test_a_killed_worker_is_named_by_all_others(where: str, doomed: int, workers: int, how: dict[str, Any]) -> None:
    outcomes = harm("kill", where, doomed, how, workers)

    assert outcomes[doomed].end == "SIGKILL"
    for other in set(range(workers)) - {doomed}:
        assert_lost(outcomes[other], doomed, "ended without reporting an error")


@pytest.mark.parametrize(
    ("where", "doomed", "how"), [("forward", 1, GUESSES), ("backward", 1, LATE), ("step", 0, LATE)]
)
def test_an_error_in_one_worker_ends_all(where: str, doomed: int, how: dict[str, Any]) -> None:
    outcomes = harm("raise", where, doomed, how)

    assert isinstance(outcomes[doomed].error, KeyError)
    assert_lost(outcomes[1 - doomed], doomed, "failed with KeyError: .*a mistake")


def test_a_worker_that_hangs_is_named_after_the_timeout() -> None:
    outcomes = harm("hang", "backward", 1, SERIAL, timeout=5)

    assert_lost(outcomes[0], 1, "is alive, but has not reached")


class Diverges(Classifier):
    """The loss becomes NaN, on all workers, as all compute the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 4 else loss


def diverge(worker: int) -> None:
    fit_stages(worker, Diverges("chain"), {"cuts": CUTS[2]}, pictures(samples=100))


def test_a_stage_with_nan_ends_the_run_at_the_next_handshake() -> None:
    for outcome in run_trainers_to_the_end(diverge, 2):
        assert isinstance(outcome.error, NotFinite), outcome
        assert "worker 1 in" in str(outcome.error)

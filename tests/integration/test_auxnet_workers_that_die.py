"""``Trainer(strategy="auxnet")``: whatever happens to one worker, no other waits forever for its messages."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import pytest
from torch import Tensor

from resist_lightning import NotFinite, WorkerLost
from tests.helpers import dying
from tests.helpers.auxnet import CUTS, GUESSES, LATE, SERIAL, fit_stages, pictures
from tests.helpers.plain import Classifier
from tests.helpers.trainers import run_trainers, run_trainers_to_the_end

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


def assert_lost(error: BaseException | None, worker: int, how: str) -> None:
    assert isinstance(error, WorkerLost), error
    assert re.match(NAME.format(worker) + how, str(error)), error


@pytest.mark.parametrize(
    ("where", "doomed", "workers", "how"),
    [
        ("forward", 2, 3, LATE),  # the others wait for the network's output
        ("backward", 1, 2, LATE),  # the other waits for a late gradient
        ("step", 0, 2, GUESSES),  # the other waits for the truth
        ("backward", 1, 2, SERIAL),  # the other waits for a gradient, inside its backward pass
        ("forward", 0, 3, SERIAL),  # worker 1 waits for the truth, and worker 2 for worker 1
    ],
)
def test_a_killed_worker_is_named_by_all_others(where: str, doomed: int, workers: int, how: dict[str, Any]) -> None:
    outcomes = harm("kill", where, doomed, how, workers)

    assert outcomes[doomed].end == "SIGKILL"
    for other in set(range(workers)) - {doomed}:
        assert_lost(outcomes[other].error, doomed, "ended without reporting an error")


def test_a_worker_that_hangs_is_named_after_the_timeout() -> None:
    outcomes = harm("hang", "backward", 1, SERIAL, timeout=5)

    assert_lost(outcomes[0].error, 1, "is alive, but has not reached")


class Diverges(Classifier):
    """The loss becomes NaN, on all workers, as all compute the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 4 else loss


class LossOfFeatures(Classifier):
    """Adds a term of features inside of the first stage to the loss."""

    def __init__(self) -> None:
        super().__init__("chain")
        self.features: list[Tensor] = []
        self.net[1].register_forward_hook(lambda norm, given, made: self.features.append(made))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.features.clear()
        loss = super().training_step(batch, batch_idx)
        return loss + sum(each.square().mean() for each in self.features)


ERRORS = {
    "before a forward": ("forward", 1, GUESSES),
    "before a backward": ("backward", 1, LATE),
    "before a step": ("step", 0, LATE),
}


def errors(worker: int) -> dict[str, BaseException]:
    """The errors of this worker in several trainings, one after the other."""
    found: dict[str, BaseException] = {}
    for name, (where, doomed, how) in ERRORS.items():
        with pytest.raises((KeyError, WorkerLost)) as raised:
            train(worker, "raise", where, doomed, how, 2, 30)
        found[name] = raised.value
    with pytest.raises(NotFinite) as diverged:
        fit_stages(worker, Diverges("chain"), {"cuts": CUTS[2]}, pictures(samples=100))
    with pytest.raises(RuntimeError) as freed:
        fit_stages(worker, LossOfFeatures(), {"cuts": CUTS[2]})
    return {**found, "NaN": diverged.value, "features": freed.value}


@pytest.fixture(scope="module")
def raised() -> list[dict[str, BaseException]]:
    return run_trainers(errors, 2, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_one_worker_ends_all(name: str, raised: list[dict[str, BaseException]]) -> None:
    doomed = ERRORS[name][1]

    assert isinstance(raised[doomed][name], KeyError)
    assert_lost(raised[1 - doomed][name], doomed, "failed with KeyError: .*a mistake")


def test_a_stage_with_nan_ends_the_run_at_the_next_handshake(raised: list[dict[str, BaseException]]) -> None:
    for of_worker in raised:
        assert "worker 1 in" in str(of_worker["NaN"])


def test_a_loss_of_features_inside_of_a_delayed_stage_says_what_it_may_depend_on(
    raised: list[dict[str, BaseException]],
) -> None:
    said = "the loss may depend on the network's output alone"
    assert said in str(raised[0]["features"])
    assert_lost(raised[1]["features"], 0, f".*{said}")

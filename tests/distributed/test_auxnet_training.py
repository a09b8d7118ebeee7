"""Stages in real gloo processes train as one process that computes the same schedule (check 6 of section 8).

All is in double precision. In steps that wait for each other, and for one worker, the numbers are those of plain
back-propagation bit for bit, and with late gradients those of the simulator. In the other steps engine and simulator
round differently, since one of them computes in units of the guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from resist_lightning import StageConfig
from resist_lightning.methods.auxnet.simulated_boundary import NetworkBoundary, StoredBoundary
from resist_lightning.methods.auxnet.step.guesses import NetworkGuesses, StoredGuesses
from tests.helpers.processes import run_workers
from tests.helpers.stages import Run, plain_training, train_engine, train_simulator, two_layers
from tests.helpers.training import clone_state

METHODS = ("penalty", "al-net", "penalty-store", "al-store")

RUNS = {
    **{
        f"{method}, vectors, a serial step now and then": Run(
            StageConfig(method=method, beta=30.0, warmup_steps=2, serial_every=4, multiplier_every=2, local_steps=4),
            9,
            batches=4,
        )
        for method in METHODS
    },
    "al-net, batch norm, looked at now and then": Run(
        StageConfig(method="al-net", beta=3.0, warmup_steps=2, multiplier_every=3, aux_width=4, local_steps=4),
        8,
        "preact",
        batches=4,
        observe_at=(0, 1, 4, 5),
    ),
    "al-store, running statistics": Run(
        StageConfig(
            method="al-store", batch_norm="running", beta=3.0, warmup_steps=2, multiplier_every=3, local_steps=3
        ),
        8,
        "preact",
        batches=4,
    ),
    "delayed, positions": Run(StageConfig(warmup_steps=2, local_steps=4), 9, "positions"),
    "delayed, vit": Run(StageConfig(warmup_steps=2, local_steps=3), 7, "vit"),
    "delayed, recurrent": Run(StageConfig(warmup_steps=0, local_steps=3), 6, "recurrent"),
    "delayed, AdamW, two steps late, looked at now and then": Run(
        StageConfig(delay=2, warmup_steps=0, local_steps=3),
        9,
        "preact",
        optimizer="adamw",
        milestones=(5,),
        observe_at=(0, 2, 3, 7),
    ),
    "delayed, frozen beginning and end": Run(
        StageConfig(warmup_steps=0), 6, frozen=("stem", "body.0", "body.3", "head")
    ),
    "delayed, not late": Run(StageConfig(delay=0, warmup_steps=0), 5, "preact"),
    "no warm-up, no batch norm": Run(
        StageConfig(method="penalty", warmup_steps=0, beta=50.0, aux_width=4), 5, "convolutions"
    ),
    "falling rate, growing beta, another step and network of the guesses, AdamW": Run(
        StageConfig(
            method="al-net",
            lambda_step=0.4,
            beta=20.0,
            beta_growth=3.0,
            warmup_steps=3,
            multiplier_every=1,
            aux_network=two_layers,
        ),
        11,
        "mlp",
        optimizer="adamw",
        milestones=(1, 5, 8),
    ),
    "falling rate and growing beta, stored": Run(
        StageConfig(method="al-store", beta=20.0, beta_growth=3.0, warmup_steps=3, multiplier_every=1),
        11,
        "mlp",
        batches=3,
        milestones=(1, 5, 8),
    ),
    "image to sequence": Run(
        StageConfig(method="penalty", beta=10.0, warmup_steps=2, aux_width=4), 5, "vit", optimizer="adamw"
    ),
    "token ids to sequence": Run(
        StageConfig(method="al-net", beta=10.0, warmup_steps=1, multiplier_every=2, aux_width=6), 5, "ids"
    ),
    "frozen first stages and head": Run(
        StageConfig(method="penalty", beta=30.0, warmup_steps=2), 6, frozen=("stem", "body.0", "body.1", "head")
    ),
    "tensors of its own": Run(StageConfig(method="penalty", beta=30.0, warmup_steps=2), 6, "positions"),
    "tensors of its own, serial": Run(StageConfig(method="penalty", warmup_steps=1, serial_every=1), 5, "positions"),
}
ROUNDED = ("delayed, recurrent",)  # MKL's sums in a recurrent layer depend on where its weights lie in memory
SERIAL = ("tensors of its own, serial", "delayed, not late")


@dataclass
class Trained:
    """A worker's results at the end."""

    state: dict[str, Tensor]
    losses: list[float]
    guesses: dict[str, Tensor]


def train_all(worker: int) -> dict[str, Trained]:
    return {name: train(worker, run) for name, run in RUNS.items()}


def train(worker: int, run: Run) -> Trained:
    engine, losses = train_engine(worker, run, 3)
    guesses = engine.sync.stage_worker.guesses
    kept: dict[str, Tensor] = {}
    if isinstance(guesses, NetworkGuesses):
        kept = clone_state(guesses.network)
    elif isinstance(guesses, StoredGuesses):
        kept = guesses.store.state_dict()
    return Trained(clone_state(engine.module), losses, kept)


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Trained]]:
    """For each of three workers, with the first stage, one between, and the last: its results of each run."""
    return run_workers(train_all, 3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the processes do: sums in another order differ in their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def simulated(name: str) -> tuple[dict[str, Tensor], list[float], list[Any]]:
    simulator, losses = train_simulator(RUNS[name], 3)
    return clone_state(simulator.full_model()), losses, simulator.boundaries


@cache
def plain(name: str) -> tuple[dict[str, Tensor], list[float]]:
    return plain_training(RUNS[name])


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", RUNS)
def test_processes_train_what_the_simulator_trains(trained: list[dict[str, Trained]], name: str) -> None:
    expected, losses, _ = simulated(name)
    for worker in trained:
        assert_close(worker[name].state, expected)
        torch.testing.assert_close(worker[name].losses, losses, rtol=1e-9, atol=0)
        assert worker[name].losses == trained[0][name].losses
        for key, value in trained[0][name].state.items():
            assert torch.equal(worker[name].state[key], value)


@pytest.mark.parametrize("name", RUNS)
def test_auxiliary_networks_and_stored_guesses_become_those_of_the_simulator(
    trained: list[dict[str, Trained]], name: str
) -> None:
    _, _, boundaries = simulated(name)
    if RUNS[name].config.delayed:
        assert boundaries == []
        assert all(worker[name].guesses == {} for worker in trained)
        return
    assert len(boundaries) == len(trained) - 1
    assert trained[0][name].guesses == {}
    for worker, boundary in zip(trained[1:], boundaries, strict=True):
        found = worker[name].guesses
        if isinstance(boundary, NetworkBoundary):
            assert_close(found, clone_state(boundary.network))
            continue
        assert isinstance(boundary, StoredBoundary)
        pairs = list(boundary.table.values())  # in the order in which samples were first seen, as in the store
        assert found["values"].shape[0] == len(pairs) > 0
        torch.testing.assert_close(found["values"][:, 0], torch.stack([guess for guess, _ in pairs]))
        if RUNS[name].config.multipliers:
            beta = RUNS[name].config.beta / found["values"][0, 0].numel()
            torch.testing.assert_close(found["values"][:, 1] * beta, torch.stack([kappa for _, kappa in pairs]))
        else:
            assert found["values"].shape[1] == 1


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.config.delayed and name not in ROUNDED])
def test_late_gradients_are_those_of_the_simulator_bit_for_bit(trained: list[dict[str, Trained]], name: str) -> None:
    expected, losses, _ = simulated(name)
    for worker in trained:
        assert worker[name].losses == losses
        for key, value in expected.items():
            if "running" not in key:  # re-estimated, as means over all workers
                assert torch.equal(worker[name].state[key], value), key


def test_steps_that_wait_for_each_other_are_plain_back_propagation_bit_for_bit(
    trained: list[dict[str, Trained]],
) -> None:
    for name, run in RUNS.items():
        _, losses = plain(name)
        serial = run.steps if name in SERIAL else min(run.config.warmup_steps, run.steps)
        assert trained[0][name].losses[:serial] == losses[:serial], name
    for name in SERIAL:
        state, _ = plain(name)
        compared = 0
        for key, value in trained[0][name].state.items():
            if "running" not in key:  # re-estimated
                assert torch.equal(value, state[key]), (name, key)
                compared += 1
        assert compared > 10


def test_steps_at_the_same_time_are_not_plain_back_propagation(trained: list[dict[str, Trained]]) -> None:
    """So the runs above do take such steps."""
    for name in RUNS:
        _, losses = plain(name)
        alike = trained[0][name].losses == pytest.approx(losses, rel=1e-9)
        assert alike == (name in SERIAL), name

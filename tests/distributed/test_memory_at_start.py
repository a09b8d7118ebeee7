"""Contract 5 where a full model is divided and assembled: at the start of a run, and in an evaluation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from experiments.harness.memory import allocate_large_tensors_apart, allocated_bytes, can_ask_malloc
from resist_lightning import Config, Engine, NeuronConfig
from resist_lightning.methods.config import CommonConfig
from resist_lightning.state.unmade import without_memory
from tests.helpers.memory import (
    BLOCK_BYTES,
    BLOCKS,
    NOISE_BYTES,
    SHARED_BYTES,
    settled_bytes,
    wide_net,
)
from tests.helpers.processes import run_workers


@dataclass(frozen=True)
class Start:
    """Bytes of a start: of the whole network, of a worker's part, and of the largest message."""

    method: str
    whole: int
    part: int
    message: int


HELD_AT_START = 2  # of the six blocks, by each of three workers
NEURONS, KEPT = 720, 240  # neurons of each of three hidden layers, and those whose rows each of three workers keeps
OWN = {"ist": KEPT, "ist, several holders": NEURONS // 2}  # neurons of a worker in each layer
SEVERAL = "ist, several holders"


def slice_bytes(own: int) -> int:
    """Bytes of all tensors of a worker with ``own`` neurons of each layer."""
    return 4 * (4 * own + 2 * (own + 1) * own + 4 * own + 4)


ROWS_BYTES = 4 * KEPT * NEURONS  # bytes that a worker keeps of a matrix between hidden layers
STARTS = [
    Start(
        "resist",
        whole=SHARED_BYTES + BLOCKS * BLOCK_BYTES,
        part=SHARED_BYTES + HELD_AT_START * BLOCK_BYTES,
        message=BLOCK_BYTES + SHARED_BYTES,  # a block, or the shared tensors
    ),
    *(
        Start(
            method,
            whole=slice_bytes(NEURONS),
            # The slice, and the rows that the worker keeps of the two matrices between hidden layers.
            part=slice_bytes(own) + 2 * ROWS_BYTES,
            # With one holder the entries outside of its slice; where neurons have several, all of a row.
            message=ROWS_BYTES if method == "ist" else ROWS_BYTES + 4 * own * own,
        )
        for method, own in OWN.items()
    ),
]

BUILDS = ("form", "whole")
PLACES = ("first", "all")  # workers that evaluate


def net_for(method: str) -> tuple[nn.Module, CommonConfig]:
    if method == "resist":
        return wide_net(), Config(local_steps=2, min_blocks=0, blocks="body.*")
    widths = [3, NEURONS, NEURONS, NEURONS, 4]
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), NeuronConfig(local_steps=2, min_share=None if method == SEVERAL else 0)


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


@contextmanager
def sampled(engine: Engine, sample: Callable[[], None]) -> Iterator[None]:
    """Sample when buffers are packed and about to be sent."""
    verbs = engine.collective
    names = ("broadcast_", "exchange", "start_all_reduce")
    usual = {name: getattr(verbs, name) for name in names}

    def watch(verb: Any, *args: Any) -> Any:
        sample()
        return verb(*args)

    for name in names:
        setattr(verbs, name, partial(watch, usual[name]))
    yield
    for name in names:
        setattr(verbs, name, usual[name])


def peaks_of_starts(worker: int) -> dict[tuple[str, str], dict[str, int]]:
    """For each start: peak bytes from malloc while the module is built and the engine starts, and bytes at the end."""
    allocate_large_tensors_apart()
    gc.disable()
    peaks = {}
    for start in STARTS:
        start_one(worker, "whole", start)  # a first run, for one-time allocations of libraries
        for build in BUILDS:
            peaks[start.method, build] = start_one(worker, build, start)
    return peaks


def start_one(worker: int, build: str, start: Start) -> dict[str, int]:
    before = allocated_bytes()
    peaks = {"built": 0, "start": 0}

    def sample(when: str) -> None:
        peaks[when] = max(peaks[when], allocated_bytes() - before)

    with without_memory() if worker and build == "form" else nullcontext():
        model, config = net_for(start.method)
    sample("built")
    engine = Engine(model, [momentum_sgd(model)], config)
    with sampled(engine, partial(sample, "start")):
        engine.start()
    peaks["end"] = settled_bytes(before + start.part + NOISE_BYTES, 0.5) - before
    engine.abandon()
    return peaks


@pytest.fixture(scope="module")
def started() -> list[dict[tuple[str, str], dict[str, int]]]:
    return run_workers(peaks_of_starts, 3)


@pytest.mark.skipif(not can_ask_malloc(), reason="needs glibc 2.33 or later to ask malloc")
@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.method)
@pytest.mark.parametrize("build", BUILDS)
def test_when_it_starts_only_worker_0_has_the_whole_model(started: Any, build: str, start: Start) -> None:
    first, *others = (worker[start.method, build] for worker in started)
    assert start.whole <= first["built"] <= start.whole + NOISE_BYTES
    assert first["start"] <= start.whole + start.message + NOISE_BYTES
    for peaks in (first, *others):
        assert start.part <= peaks["end"] <= start.part + NOISE_BYTES
    for peaks in others:
        assert peaks["built"] <= (NOISE_BYTES if build == "form" else start.whole + NOISE_BYTES)
        assert peaks["start"] <= start.part + start.message + NOISE_BYTES


def peaks_of_evaluations(worker: int) -> dict[tuple[str, str], int]:
    """For each place and IST training: peak bytes from malloc in an evaluation."""
    allocate_large_tensors_apart()
    gc.disable()
    peaks = {}
    for start in STARTS[1:]:
        evaluate_one("all", start.method)  # a first run, for one-time allocations of libraries
        for where in PLACES:
            peaks[where, start.method] = evaluate_one(where, start.method)
    return peaks


def evaluate_one(where: str, method: str) -> int:
    before, peak = allocated_bytes(), 0
    model, config = net_for(method)
    optimizer = momentum_sgd(model)
    engine = Engine(model, [optimizer], replace(config, evaluate_on=where))

    def sample() -> None:
        nonlocal peak
        peak = max(peak, allocated_bytes() - before)

    engine.start()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    engine.after_step()
    with sampled(engine, sample), engine.full_model():
        sample()
    engine.abandon()
    return peak


@pytest.fixture(scope="module")
def evaluated() -> list[dict[tuple[str, str], int]]:
    return run_workers(peaks_of_evaluations, 3)


@pytest.mark.skipif(not can_ask_malloc(), reason="needs glibc 2.33 or later to ask malloc")
@pytest.mark.parametrize("start", STARTS[1:], ids=lambda start: start.method)
@pytest.mark.parametrize("where", PLACES)
def test_neurons_are_put_together_some_tensors_at_a_time(evaluated: Any, where: str, start: Start) -> None:
    """At most the largest tensor at once; where worker 0 evaluates, one worker after the other."""
    peaks = [worker[where, start.method] for worker in evaluated]
    own = slice_bytes(OWN[start.method])
    # Slices with gradients and momentum, and the store.
    training = start.part + 2 * own
    # Means are taken in the slices, so copies are kept for the way back.
    copies = own if start.method == SEVERAL else 0
    # A worker that assembles the network also has copies of its slices for the way back, in the place of the slices.
    whole = start.whole + training
    if where == "first":
        assert whole <= peaks[0] <= whole + start.message + NOISE_BYTES
        assert all(training < peak <= training + copies + start.message + NOISE_BYTES for peak in peaks[1:])
    else:
        assert all(whole <= peak <= whole + 4 * NEURONS * NEURONS + NOISE_BYTES for peak in peaks)

"""Contract 5: absent means absent, measured in allocated bytes, at every step of training.

With Q bytes shared, k blocks of b bytes and m optimizer slots a worker keeps (2 + m)(Q + k b), and not a byte more;
in a sync, beside that, the flat buffers that it sends and receives. An outer optimizer keeps two copies more.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from experiments.harness.memory import allocate_large_tensors_apart, allocated_bytes, can_ask_malloc
from resist_lightning import Config, Engine
from tests.helpers.memory import (
    BLOCK_BYTES,
    BLOCKS,
    NOISE_BYTES,
    SHARED_BYTES,
    settled_bytes,
    storage_bytes,
    wide_net,
)
from tests.helpers.nets import Normed
from tests.helpers.processes import run_workers
from tests.helpers.training import Run, train_engine

STEPS = 4
SLOTS = {"sgd": 1, "sgd, outer": 1, "adamw": 2}
COPIES = {"sgd, outer": 2}  # values at the beginning of the round, and velocity; each block has one holder here


@dataclass(frozen=True)
class Sample:
    """Bytes at one moment: kept by parameters, gradients and state; got from malloc; in flat buffers of a sync."""

    when: str
    kept: int
    allocated: int
    buffers: int = 0


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def measure(worker: int, cases: list[tuple[str, Config]]) -> list[tuple[list[Sample], list[int]]]:
    allocate_large_tensors_apart()
    gc.disable()  # memory must be freed at once, without a search for cycles
    for case in cases:  # a first run, for one-time allocations of libraries
        measure_one(worker, *case, patience_seconds=0)
    return [measure_one(worker, *case, patience_seconds=0.5) for case in cases]


def measure_one(worker: int, name: str, config: Config, *, patience_seconds: float) -> tuple[list[Sample], list[int]]:
    before = allocated_bytes()
    model = wide_net()
    optimizer = optimizer_for(name, model)
    engine = Engine(model, [optimizer], config)
    samples: list[Sample] = []
    observing = False

    def sample(when: str, buffers: int = 0) -> None:
        kept = storage_bytes(model, [optimizer])
        if observing:
            samples.append(Sample("observing", kept, allocated_bytes() - before, buffers))
        else:
            copies = COPIES.get(name, 0) * (SHARED_BYTES + len(engine.partition.held[worker]) * BLOCK_BYTES)
            limit = before + kept + copies + buffers + NOISE_BYTES
            allocated = settled_bytes(limit, patience_seconds) - before
            samples.append(Sample(when, kept, allocated, buffers))

    engine.start()
    sample("start")
    held = []
    with watched(engine, sample):
        for step in range(STEPS):
            held.append(len(engine.partition.held[worker]))
            optimizer.zero_grad()
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            sample("backward")
            optimizer.step()
            sample("step")
            assert_nothing_of_absent_blocks(model, optimizer, engine, worker)
            engine.after_step()
            sample("after")
            assert_nothing_of_absent_blocks(model, optimizer, engine, worker)
            if step == 2:
                observing = True
                with engine.full_model():
                    pass
                observing = False
                sample("observed")
    engine.abandon()
    return samples, held


@contextmanager
def watched(engine: Engine, sample: Any) -> Iterator[None]:
    """Sample when buffers are packed and about to be sent."""
    verbs = engine.collective
    all_reduce, exchange = verbs.start_all_reduce, verbs.exchange

    def watch_mean(flat, kind):
        sample("mean", flat.nbytes)
        return all_reduce(flat, kind)

    def watch_exchange(sends, receives, kinds):
        flats = [flat for side in (sends, receives) for flats in side.values() for flat in flats]
        sample("exchange", sum(flat.nbytes for flat in flats))
        exchange(sends, receives, kinds)

    verbs.start_all_reduce, verbs.exchange = watch_mean, watch_exchange
    yield
    verbs.start_all_reduce, verbs.exchange = all_reduce, exchange


def assert_nothing_of_absent_blocks(model: nn.Module, optimizer: Any, engine: Engine, worker: int) -> None:
    held = engine.partition.held[worker]
    for index, block in enumerate(model.body):
        for parameter in block.parameters():
            assert parameter.is_meta == (index not in held)
            if index not in held:
                assert parameter.grad is None
                assert parameter not in optimizer.state


CASES = {
    2: [("sgd, outer", Config(local_steps=2, min_blocks=0, blocks="body.*", test_scale=0.3, outer="nesterov"))],
    3: [
        ("adamw", Config(local_steps=2, min_blocks=3, blocks="body.*", fragments=2)),
        ("adamw", Config(local_steps=1, min_blocks=1, blocks="body.*", momentum="travel")),
    ],
}


@pytest.fixture(scope="module", params=CASES)
def measured(request: pytest.FixtureRequest) -> list[tuple[str, int, list[Sample], list[int]]]:
    """Optimizer, worker, samples, and the number of blocks held at each step."""
    cases = CASES[request.param]
    results = run_workers(measure, request.param, cases)
    return [
        (name, worker, *results[worker][number])
        for number, (name, _) in enumerate(cases)
        for worker in range(request.param)
    ]


def bound(name: str, blocks: int) -> int:
    """(2 + m)(Q + k b), and Adam's counters of steps: four bytes for each parameter tensor."""
    numbers = 4 * (4 + 4 * blocks) if name == "adamw" else 0
    return (2 + SLOTS[name]) * (SHARED_BYTES + blocks * BLOCK_BYTES) + numbers


def allocated_bound(name: str, blocks: int) -> int:
    """Limit of allocated bytes without buffers: also the copies of the outer optimizer."""
    return bound(name, blocks) + COPIES.get(name, 0) * (SHARED_BYTES + blocks * BLOCK_BYTES)


def test_the_sizes_are_those_of_the_network():
    net = wide_net()
    assert storage_bytes(net.body[0]) == BLOCK_BYTES
    assert storage_bytes(net) == SHARED_BYTES + BLOCKS * BLOCK_BYTES


def test_after_every_step_a_worker_keeps_exactly_its_share(measured):
    for name, _, samples, held in measured:
        kept = [sample.kept for sample in samples if sample.when == "step"]
        assert kept == [bound(name, blocks) for blocks in held]
        assert all(blocks < BLOCKS for blocks in held)
        assert samples[0].kept == SHARED_BYTES + held[0] * BLOCK_BYTES


def test_at_no_moment_does_a_worker_keep_more_than_its_share(measured):
    for name, _, samples, held in measured:
        assert {"start", "backward", "step", "mean", "exchange", "after", "observed"} <= {s.when for s in samples}
        for sample in samples:
            if sample.when != "observing":  # the full model is assembled then
                assert sample.kept <= bound(name, max(held)), sample


@pytest.mark.skipif(not can_ask_malloc(), reason="needs glibc 2.33 or later to ask malloc")
def test_the_process_has_not_allocated_more_either(measured):
    """Beside parameters, gradients and state only flat buffers in a sync, which are gone afterwards."""
    for name, _, samples, held in measured:
        first = samples[: [sample.when for sample in samples].index("observing")]
        assert_within(first, allocated_bound(name, max(held)))
        steps = [sample.allocated for sample in first if sample.when == "step"]
        least, all_blocks = allocated_bound(name, max(held)), allocated_bound(name, BLOCKS)
        assert least - NOISE_BYTES < max(steps) < all_blocks - BLOCK_BYTES


@pytest.mark.skipif(not can_ask_malloc(), reason="needs glibc 2.33 or later to ask malloc")
def test_an_observation_leaves_no_memory_behind(measured):
    for name, _, samples, held in measured:
        later = samples[[sample.when for sample in samples].index("observed") :]
        assert_within(later, allocated_bound(name, max(held)))


def assert_within(samples: list[Sample], bound_bytes: int) -> None:
    assert samples
    for sample in samples:
        assert sample.allocated <= bound_bytes + sample.buffers + NOISE_BYTES, sample


def where_shared_tensors_live(worker):
    """Numbers of storages: of shared float tensors while training, of all tensors afterwards."""
    run = Run(Config(local_steps=2, min_blocks=1), steps=4, net=Normed)
    found = []

    def look(engine, step):
        tensors = [tensor for tensor in engine.layout.shared.values() if tensor.is_floating_point()]
        found.append(len({tensor.untyped_storage().data_ptr() for tensor in tensors}))

    engine, _ = train_engine(worker, run, look)
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    return found, len(tensors), len({tensor.untyped_storage().data_ptr() for tensor in tensors})


def test_shared_tensors_are_averaged_in_place_and_part_when_the_training_ends():
    for while_training, tensors, storages in run_workers(where_shared_tensors_live, 2):
        assert while_training == [1, 1, 1, 1]
        assert storages == tensors

"""Contract 3: after a sync every tensor is the mean over the workers that held it; one holder means an exact copy.

Each worker plants numbers of its own in every tensor that it has, and syncs without training; the expected result is
computed from the same numbers, in double precision, with no process.
"""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config, Engine
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.schedule.partition import Partition, draw_partition, everything
from resist_lightning.schedule.transfers import plan_sync
from tests.helpers.nets import Normed, small_preact
from tests.helpers.processes import run_workers
from tests.helpers.training import present_state, present_tensors

ROUNDS = 2
START = -1

# Rounding of a mean of up to four numbers of about 1; two roundings at most are as large as the sum.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}
TOLERANCE |= {torch.complex64: 1e-6, torch.complex128: 1e-14, torch.float8_e4m3fn: 0.2, torch.float8_e5m2: 0.4}

ODD = (torch.int16, torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex128)

CHANNELS_LAST = torch.float64  # networks of this data type are convolutional, in that memory format

CASES = {
    (2, "partition"): (torch.float32,),
    (3, "partition"): (torch.float16, torch.float64),
    (3, "overlap"): (torch.bfloat16,),
    (4, "overlap"): (torch.float32,),
    (3, "everything"): (torch.float32, torch.float16),
    (3, "warm-up"): (torch.float32,),
}
CONFIGS = {
    "partition": Config(local_steps=1, min_blocks=0),
    "overlap": Config(local_steps=1, min_blocks=3, seed=1),
    "everything": Config(local_steps=1, min_blocks=4),
    "warm-up": Config(local_steps=1, min_blocks=1, warmup_rounds=1),
}


def partition_of(case: str, workers: int, round: int) -> Partition:
    config = CONFIGS[case]
    if round < config.warmup_rounds:
        return everything(4, workers)
    return draw_partition(4, workers, config.min_blocks, config.seed, round)


def blocks_of(net: nn.Module) -> nn.Sequential:
    """The blocks, of which the first is shared."""
    return net.body if isinstance(net, Normed) else net.section3


def make(dtype: torch.dtype) -> nn.Module:
    """A network with floats of one data type, and buffers of other types in a block and outside."""
    if dtype == CHANNELS_LAST:
        net: nn.Module = small_preact().to(dtype, memory_format=torch.channels_last)
    else:
        net = Normed().to(dtype)
    for owner in (net, blocks_of(net)[2]):
        owner.register_buffer("flags", torch.zeros(5, dtype=torch.bool))
        owner.register_buffer("table", torch.zeros(2, 2, dtype=torch.int32))
        owner.register_buffer("bytes", torch.zeros(3, dtype=torch.uint8))
        owner.register_buffer("precise", torch.zeros(3, dtype=torch.float64))
        owner.register_buffer("one", torch.zeros((), dtype=torch.float64))
        owner.register_buffer("none", torch.zeros((0, 3)))
        owner.register_buffer("turned", torch.zeros(4, 3).t()[:, ::2])
        owner.spectrum = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
        for odd in ODD:
            owner.register_buffer(str(odd).replace("torch.", "odd_"), torch.zeros(3, dtype=odd))
    return net


def planted(name: str, tensor: Tensor, worker: int, round: int) -> Tensor:
    """Numbers that differ between workers, rounds and tensors."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {worker} {round}".encode()))
    if tensor.is_complex():
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return torch.randint(0, 2 if tensor.dtype == torch.bool else 100, tensor.shape, generator=generator).to(
        tensor.dtype
    )


def plant(model: nn.Module, worker: int, round: int) -> None:
    with torch.no_grad():
        for name, tensor in present_tensors(model).items():
            tensor.copy_(planted(name, tensor, worker, round))


def present(model: nn.Module) -> dict[str, Tensor]:
    return {name: exact(tensor) for name, tensor in present_state(model).items()}


def sync_what_was_planted(worker: int, case: str, dtypes: tuple[torch.dtype, ...]) -> list[list[dict[str, Tensor]]]:
    """For each data type: the worker's tensors after the start, and after the sync of each round."""
    results = []
    for dtype in dtypes:
        model = make(dtype)
        engine = Engine(model, [], CONFIGS[case])
        plant(model, worker, START)
        engine.start()
        seen = [present(model)]
        sizes, expected = engine.layout.sizes(engine.states), Counter()
        for round in range(ROUNDS):
            plant(model, worker, round)
            plan = plan_sync(engine.layout.partition(round), engine.layout.partition(round + 1))
            expected.update(sync_bytes(plan, sizes, engine.collective.workers)[worker])
            engine.after_step()
            seen.append(present(model))
            assert dtype != CHANNELS_LAST or all_channels_last(model)
        assert {kind: engine.collective.sent_bytes[kind] for kind in expected} == expected
        engine.abandon()
        results.append(seen)
    return results


def all_channels_last(model: nn.Module) -> bool:
    images = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    return bool(images) and all(image.is_contiguous(memory_format=torch.channels_last) for image in images)


def block_of(name: str) -> int | None:
    head, _, tail = name.partition(".")
    index = int(tail.split(".")[0]) if head in ("section3", "body") else 0
    return index - 1 if index else None


@pytest.mark.parametrize(("workers", "case"), CASES, ids=str)
def test_after_a_sync_every_tensor_is_the_mean_over_its_holders(workers, case):
    dtypes = CASES[workers, case]
    results = run_workers(sync_what_was_planted, workers, case, dtypes)
    for number, dtype in enumerate(dtypes):
        empty = make(dtype).state_dict()
        seen = [results[worker][number] for worker in range(workers)]
        assert_all_took_worker_0_s_weights(empty, [history[0] for history in seen], partition_of(case, workers, 0))
        for round in range(ROUNDS):
            after = [history[round + 1] for history in seen]
            assert_mean_over_holders(empty, after, case, round)


def assert_all_took_worker_0_s_weights(
    empty: dict[str, Tensor], seen: list[dict[str, Tensor]], first: Partition
) -> None:
    for worker, state in enumerate(seen):
        assert set(state) == expected_names(empty, first, worker)
        for name, tensor in state.items():
            assert torch.equal(tensor, exact(planted(name, empty[name], 0, START))), name


def assert_mean_over_holders(empty: dict[str, Tensor], seen: list[dict[str, Tensor]], case: str, round: int) -> None:
    workers = len(seen)
    before, after = (partition_of(case, workers, number) for number in (round, round + 1))
    for worker, state in enumerate(seen):
        assert set(state) == expected_names(empty, after, worker)
    for name, kind in empty.items():
        block = block_of(name)
        holders = range(workers) if block is None else before.holders(block)
        values = torch.stack([exact(planted(name, kind, holder, round)) for holder in holders])
        found = [state[name] for state in seen if name in state]
        assert found
        for tensor in found:
            if len(values) == 1 or not tensor.numel():
                assert torch.equal(tensor, values[0]), name
            elif kind.is_floating_point() or kind.is_complex():
                assert (tensor - values.mean(0)).abs().max() <= TOLERANCE[kind.dtype], name
                assert tensor.numel() < 3 or not torch.equal(tensor, values[0])
            else:
                assert torch.equal(tensor, values.amax(0)), name
            assert torch.equal(tensor, found[0]), f"{name} differs between workers"


def exact(tensor: Tensor) -> Tensor:
    """A tensor as real numbers in double precision."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def expected_names(empty: dict[str, Tensor], partition: Partition, worker: int) -> set[str]:
    return {name for name in empty if block_of(name) is None or block_of(name) in partition.held[worker]}

"""Contract 4: the bytes sent are exactly the closed form, and nothing is sent between two syncs.

Each number of workers trains its runs in one set of processes; messages are recorded in torch's dispatcher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from resist_lightning import Config, Engine
from resist_lightning.comm.byte_formulas import SYNC_KINDS
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.nets import Normed
from tests.helpers.processes import run_workers
from tests.helpers.training import Run, SmallRun, batch_of, make_model, make_optimizer, train_step
from tests.helpers.wire import Call, Quantizer, collectives_so_far, groups, sent_bytes

RUNS = {
    "no overlap": SmallRun(Config(local_steps=2, min_blocks=0), steps=6),
    "deeper": Run(Config(local_steps=2, min_blocks=0), steps=4, net=partial(Normed, blocks=8)),
    "overlap, warm-up": SmallRun(Config(local_steps=1, min_blocks=3, seed=3, warmup_rounds=1), steps=4),
    "measuring": SmallRun(Config(local_steps=1, min_blocks=1, blocks_per_worker="auto"), steps=5),
    "travel with AdamW": SmallRun(Config(local_steps=1, min_blocks=3, momentum="travel"), steps=3, optimizer="adamw"),
    "int8": Run(Config(local_steps=1, min_blocks=0, wire="int8"), steps=2),
    "int6, overlap, warm-up, travel": SmallRun(
        Config(local_steps=1, min_blocks=3, wire="int6", warmup_rounds=2, momentum="travel"), steps=5
    ),
    "bf16, frozen": SmallRun(Config(local_steps=1, min_blocks=4, wire="bf16"), steps=3, frozen=("body.2", "stem")),
    "outer, int2, frozen": SmallRun(
        Config(local_steps=1, min_blocks=1, wire="int2", outer="nesterov"), steps=4, frozen=("body.2",)
    ),
    "travel, outer, finish": SmallRun(
        Config(local_steps=1, min_blocks=1, finish_rounds=2, momentum="travel", outer="nesterov"), steps=5
    ),
    "growth, AdamW travels, outer": SmallRun(
        Config(local_steps=1, growth=[0.25, 0.6, 1], momentum="travel", outer="nesterov"), steps=6, optimizer="adamw"
    ),
    "fragments, warm-up, travel": Run(
        Config(local_steps=1, min_blocks=2, fragments=2, warmup_rounds=1, momentum="travel"), steps=4
    ),
    "fragments, int8, outer": Run(
        Config(local_steps=1, min_blocks=2, fragments=2, wire="int8", outer="nesterov"), steps=3
    ),
    "outer, local SGD": SmallRun(Config(local_steps=1, blocks=[], batch_norm="running", outer="nesterov"), steps=2),
}
WITHOUT_OVERLAP = ("no overlap", "deeper")
WITH_TWO_WORKERS = (*WITHOUT_OVERLAP, "overlap, warm-up", "int8", "growth, AdamW travels, outer", "outer, local SGD")
COMPRESSED = [name for name, run in RUNS.items() if run.config.wire != "fp32"]


@dataclass
class Sync:
    """A step of a worker: its messages while training, and in the sync if there was one."""

    training: list[Call]
    syncing: list[Call]
    numbers: tuple[int, int, int]
    groups: int
    counted: Counter[str]


def talk(worker: int, names: Collection[str]) -> dict[str, list[Sync]]:
    return {name: talk_in(worker, RUNS[name]) for name in names}


def talk_in(worker: int, run: Run) -> list[Sync]:
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config, total_steps=run.steps)
    engine.start()
    steps = []
    for step in range(run.steps):
        counted = Counter(engine.collective.sent_bytes)
        with Quantizer() as wire:
            first = collectives_so_far()
            train_step(model, optimizer, batch_of(worker, step))
            training, second = wire.take(), collectives_so_far()
            engine.after_step()
            syncing, third = wire.take(), collectives_so_far()
        sent = Counter(engine.collective.sent_bytes)
        sent.subtract(counted)
        steps.append(Sync(training, syncing, (first, second, third), groups(), sent))
    engine.abandon()
    return steps


@pytest.fixture(scope="module", params=[2, 3])
def said(request: pytest.FixtureRequest) -> list[dict[str, list[Sync]]]:
    """For each worker, its messages in each run."""
    return run_workers(talk, request.param, WITH_TWO_WORKERS if request.param == 2 else tuple(RUNS))


def syncs_of(run: Run, steps: list[Sync]) -> list[Sync]:
    syncs = steps[run.config.local_steps - 1 :: run.config.local_steps]
    assert len(syncs) == run.steps // run.config.local_steps > 0
    return syncs


def test_bytes_counted_are_the_closed_form_for_every_worker_round_and_kind(said):
    workers = len(said)
    kinds = Counter()
    for name in said[0]:
        run, model = RUNS[name], make_model(RUNS[name])
        layout = BlockLayout(model, run.config, workers)
        layout.plan_end(Clock(1), run.steps)
        states = OptimizerStates([make_optimizer(run, model)])
        for worker in range(workers):
            for round, sync in enumerate(syncs_of(run, said[worker][name])):
                plan = layout.schedule.plan(round)
                sizes, following = (
                    layout.sizes(states, plan.fragment),
                    layout.schedule.coming_plan(plan.fragment, round + 1),
                )
                expected = sync_bytes(plan, sizes, workers, following)[worker]
                assert {kind: sync.counted[kind] for kind in SYNC_KINDS} == expected, (name, worker, round)
                kinds.update(expected)
    assert all(kinds[kind] > 0 for kind in SYNC_KINDS)


def test_bytes_counted_are_those_that_crossed_the_wire(said):
    workers = len(said)
    for name in said[0]:
        for worker in range(workers):
            for step in said[worker][name]:
                wire = sent_bytes(step.syncing, worker, workers)
                if name not in COMPRESSED:  # compressed means go from worker to worker
                    assert step.counted["shared"] == wire["allreduce_"]
                training = sum(step.counted[kind] for kind in SYNC_KINDS)
                assert training == wire["allreduce_"] + wire["send"]
                assert step.counted["control"] == wire["_allgather_base_"]
                assert sum(step.counted.values()) == sum(wire.values())


def test_without_overlap_the_bytes_are_what_one_counts_by_hand(said):
    workers = len(said)
    for name in WITHOUT_OVERLAP:
        run = RUNS[name]
        model, schedule = make_model(run), BlockLayout(make_model(run), run.config, workers).schedule
        sizes = [tensor_bytes(model.body[index + 1]) for index in range(schedule.blocks)]
        whole = tensor_bytes(model)
        shared = {dtype: whole[dtype] - sum(size[dtype] for size in sizes) for dtype in whole}
        for worker in range(workers):
            for round, sync in enumerate(syncs_of(run, said[worker][name])):
                before, after = schedule.partition(round), schedule.partition(round + 1)
                leaving = set(before.held[worker]) - set(after.held[worker])
                assert +sync.counted == +Counter(
                    shared=sum(-(-2 * (workers - 1) * size // workers) for size in shared.values()),
                    hand_over=sum(sizes[block].total() for block in leaving),
                    control=sync.counted["control"],
                )
                assert sync.counted["control"] <= 8 * 13 * (workers - 1)


def tensor_bytes(module: torch.nn.Module) -> Counter[torch.dtype]:
    sizes: Counter[torch.dtype] = Counter()
    for tensor in module.state_dict().values():
        sizes[tensor.dtype] += tensor.numel() * tensor.element_size()
    return sizes


def test_between_two_syncs_nobody_says_a_word_and_no_group_is_ever_made(said):
    silent = 0
    for worker in said:
        for name, steps in worker.items():
            syncs = {id(step) for step in syncs_of(RUNS[name], steps)}
            for step in steps:
                first, second, third = step.numbers
                assert step.training == []
                assert second == first
                assert third - second == len(step.syncing)
                assert bool(step.syncing) == (id(step) in syncs)
                assert step.groups == 1
                silent += id(step) not in syncs
    assert silent > 0


def test_the_number_of_collectives_and_messages_does_not_depend_on_the_number_of_tensors(said):
    """A header, an all-reduce per data type, and for every peer and data type a message to merge, and one to move."""
    workers = len(said)
    data_types = 3  # float32, int64 of batch norm's counters, and bytes of compressed tensors
    for worker in said:
        for name, steps in worker.items():
            for sync in syncs_of(RUNS[name], steps):
                verbs = [call.verb for call in sync.syncing]
                assert [verb for verb in verbs if verb not in ("send", "recv_")] == [
                    *("_allgather_base_", "allreduce_", "allreduce_")
                ]
                assert verbs[0] == "_allgather_base_"
                phases = 1 if name in WITHOUT_OVERLAP else 2
                if name in COMPRESSED:  # to the averaging workers, and back; with two bits matrices, then vectors
                    phases += 4 if RUNS[name].config.wire == "int2" else 2
                for verb in ("send", "recv_"):
                    peers = Counter((call.peer, call.dtype) for call in sync.syncing if call.verb == verb)
                    assert max(peers.values(), default=0) <= phases
                    assert verbs.count(verb) <= phases * data_types * (workers - 1)


def test_every_receive_is_posted_before_any_send(said):
    """Over gloo, two workers that both send first would take turns on the link (design, section 4)."""
    for worker in said:
        for name in WITHOUT_OVERLAP:
            for sync in syncs_of(RUNS[name], worker[name]):
                verbs = [call.verb for call in sync.syncing[3:]]
                assert verbs == sorted(verbs)  # "recv_" before "send"


def test_what_one_sends_another_receives(said):
    sent, received = Counter(), Counter()
    for worker, runs in enumerate(said):
        for steps in runs.values():
            for step in steps:
                for call in step.syncing:
                    if call.verb == "send":
                        sent[worker, call.peer, call.payload_bytes, call.dtype] += 1
                    elif call.verb == "recv_":
                        received[call.peer, worker, call.payload_bytes, call.dtype] += 1
    assert sent == received
    assert sent.total() > 0


def test_fewer_bits_send_as_many_times_less_and_a_scale_per_group(said):
    """For trainable parameters; batch norm's buffers are sent as they are."""
    workers, run = len(said), RUNS["int8"]
    model = make_model(run)
    trained = {name: p.numel() for name, p in model.named_parameters()}
    blocks = [f"section3.{index + 1}." for index in range(4)]
    block = sum(count for name, count in trained.items() if name.startswith(blocks[0]))
    shared = sum(trained.values()) - len(blocks) * block
    others = [tensor for name, tensor in model.named_buffers() if not name.startswith(tuple(blocks))]
    buffers = sum(tensor.numel() for tensor in others if tensor.is_floating_point())
    counters = sum(tensor.nbytes for tensor in others if not tensor.is_floating_point())
    plain = sum(-(-2 * (workers - 1) * size // workers) for size in (4 * buffers, counters))
    messages = -(-shared // 256) * 260
    for round in range(run.steps):
        counted = [syncs_of(run, worker["int8"])[round].counted["shared"] - plain for worker in said]
        assert sum(counted) == 2 * (workers - 1) * messages
        assert max(counted) - min(counted) <= 260 * workers
    assert messages * 4 <= 4 * shared * (1 + 4 / 256) + 4 * 260

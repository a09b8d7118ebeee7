"""Contracts 6 and 7 of IST, by engines whose workers are threads: observing changes nothing, and resuming is exact."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning import QSR, Engine, NeuronConfig, PostLocal
from resist_lightning.comm.byte_formulas import TRAINING_KINDS
from tests.helpers.ist import (
    ONE_AT_A_TIME,
    Run,
    batch_of,
    make_net,
    make_optimizer,
    one_holder,
    start_engine,
    train_engine,
    train_simulator,
)
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, decay, train_step

STEPS = 5
RUNS = {
    "reset": Run(one_holder(local_steps=3), STEPS),
    "travel, AdamW": Run(one_holder(local_steps=2, momentum="travel"), STEPS, optimizer="adamw"),
    "several holders, travel, convolutions": Run(
        NeuronConfig(local_steps=2, momentum="travel", min_share=0.5), STEPS, "conv"
    ),
    "more and more holders, at last all, keep": Run(
        NeuronConfig(local_steps=1, momentum="keep", growth=(0.1, 0.6), finish_rounds=2), STEPS
    ),
    "rounds that follow the rate, no norm": Run(
        NeuronConfig(local_steps=QSR(1, 0.06), momentum="travel"), STEPS, "plain", decay=0.8
    ),
    "rounds that grow, keep, running statistics": Run(
        one_holder(local_steps=PostLocal(1, 2, 2), momentum="keep", batch_norm="running"), STEPS
    ),
    "statistics of batches": Run(one_holder(local_steps=2, batch_norm="batch"), STEPS, "paper"),
}
STOPS = (2, 3)
"""Resumes follow these steps, counted from 0: one is the last of a round, the other lies within one."""


ON_FIRST = {
    "several holders": Run(NeuronConfig(local_steps=4, min_share=0.6, evaluate_on="first"), STEPS, "plain"),
    "more and more holders": Run(
        NeuronConfig(local_steps=2, growth=(0.4, 0.8), finish_rounds=1, momentum="travel", evaluate_on="first"), STEPS
    ),
}
"""Trainings in which only worker 0 has the full model, for which the others' neurons are merged, too."""


def trained(collective, run, observe):
    """After each step: the worker's tensors, with state, and its view of the full model."""
    engine, optimizer = start_engine(run, collective)
    had, seen = [], []
    for step in range(run.steps):
        train_step(engine.module, optimizer, batch_of(run, collective.worker, step))
        decay(run, optimizer)
        engine.count_step()
        if observe:
            sent = {kind: collective.sent_bytes[kind] for kind in TRAINING_KINDS}
            engine.begin_observation("checkpoint" if step % 2 else "evaluation")
            with torch.no_grad():
                logits = engine.module.eval()(batch_of(run, 0, 99)[0])
            seen.append((clone_state(engine.module), logits))
            said = [line for line in collective.room.log if line[0] == collective.worker]
            engine.end_observation()
            assert said == [line for line in collective.room.log if line[0] == collective.worker]
            assert sent == {kind: collective.sent_bytes[kind] for kind in TRAINING_KINDS}
            engine.module.train()
        state = [
            slot for slots in optimizer.state.values() for slot in slots.values() if isinstance(slot, torch.Tensor)
        ]
        had.append((clone_state(engine.module), [slot.clone() for slot in state]))
        engine.sync_if_due()
    engine.finish()
    return had, seen, clone_state(engine.module)


@cache
def observed_training(name):
    return run_threads(trained, 3, RUNS[name], True)[0]


@pytest.mark.parametrize("name", RUNS)
def test_observing_at_every_step_changes_no_bit_of_weights_or_state(name):
    plain, _ = run_threads(trained, 3, RUNS[name], False)
    for (had, _, final), (had_too, seen, final_too) in zip(plain, observed_training(name), strict=True):
        assert len(seen) == STEPS
        for (state, slots), (state_too, slots_too) in zip(had, had_too, strict=True):
            assert_equal_states(state_too, state, exactly=True)
            assert len(slots) == len(slots_too) > 0
            assert all(map(torch.equal, slots, slots_too))
        assert_equal_states(final_too, final, exactly=True)


@pytest.mark.parametrize("name", RUNS)
def test_the_full_model_in_the_middle_of_a_round_is_as_if_the_round_ended_there(name):
    """And it is a plain model with the observed outputs."""
    run, expected = RUNS[name], []

    def see(simulator, step):
        full = simulator.full_model().eval()
        expected.append(clone_state(full))

    train_simulator(run, 3, see)
    observed = observed_training(name)
    for step in range(STEPS):
        first, logits = observed[0][1][step]
        assert_equal_states(first, expected[step])
        for _, seen, _ in observed:
            assert_equal_states(seen[step][0], first, exactly=True)
        if name != "statistics of batches":
            plain = make_net(run).eval()
            plain.load_state_dict(first, strict=True)
            with torch.no_grad():
                torch.testing.assert_close(plain(batch_of(run, 0, 99)[0]), logits, rtol=0, atol=0)


def observed_then_synced(collective, run):
    """At the end of each round: the full model as observed before the sync, and after it."""
    engine, optimizer = start_engine(run, collective)
    pairs = []
    for step in range(run.steps):
        train_step(engine.module, optimizer, batch_of(run, collective.worker, step))
        decay(run, optimizer)
        engine.count_step()
        with engine.full_model() as full:
            before = clone_state(full)
        engine.sync_if_due()
        with engine.full_model() as full:
            pairs.append((before, clone_state(full)))
    engine.abandon()
    return pairs


def test_what_is_seen_at_the_end_of_a_round_is_what_the_sync_makes_of_it_bit_for_bit():
    run = Run(one_holder(local_steps=1, batch_norm="running", momentum="travel"), 4)
    for pairs in run_threads(observed_then_synced, 3, run)[0]:
        for before, after in pairs:
            assert_equal_states(after, before, exactly=True)


class InTwoParts(nn.Module):
    """A network of two parts with a batch norm each; the neurons between them are dealt out."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7))
        self.head = nn.Sequential(nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4))

    def forward(self, x):
        return self.head(self.body(x))


def train_in_parts(collective, policy, whole):
    with ONE_AT_A_TIME:
        net = InTwoParts()
        engine = Engine(
            net, [torch.optim.SGD(net.parameters(), 0.1)], NeuronConfig(batch_norm=policy), collective=collective
        )
    engine.start()
    x = batch_of(Run(NeuronConfig(), 0), collective.worker, 0)[0]
    net(x) if whole else net.head(net.body(x))
    engine.count_step()
    engine.finish()
    return net.head[0].running_var.isfinite().all()


def test_parts_that_are_called_one_by_one_are_refused_where_batch_norm_is_re_estimated():
    """Their inputs are those of a subnet, and the full model cannot take them."""
    with pytest.raises(
        RuntimeError, match=r"'head' of the full model fails .* self\(x\), or choose batch_norm='running'"
    ):
        run_threads(train_in_parts, 2, "recalibrate", False)
    for policy, whole in (("running", False), ("batch", False), ("recalibrate", True)):
        assert all(run_threads(train_in_parts, 2, policy, whole)[0])


# ------------------------------------------------------------------ resuming


def saved(state):
    """A state after saving and safe loading (``weights_only``)."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train_and_save(collective, run):
    """For each step of STOPS the contents of a checkpoint's files, and the end of the unbroken run."""
    checkpoints: dict[int, Any] = {}

    def save(engine, step):
        if step not in STOPS:
            return
        with engine.full_model("checkpoint") as full:
            whole = clone_state(full) if engine.observation.whole else {}
            checkpoints[step] = saved((whole, engine.checkpoint_state(), engine.resumption.state_dict()))

    _, final = train_engine(run, collective.worker, save, collective)
    return checkpoints, final


def resume(collective, run, checkpoints, exact):
    whole, *_ = checkpoints[0]
    _, state, own = checkpoints[collective.worker % len(checkpoints)]
    with ONE_AT_A_TIME:
        net = make_net(run)
        for parameter in net.parameters():
            nn.init.constant_(parameter, 7.0)
        net.load_state_dict(whole)
        optimizer = make_optimizer(run, net)
        engine = Engine(net, [optimizer], run.config, collective=collective, total_steps=run.steps)
    engine.restore(state, own if exact else None)
    engine.start()
    first = engine.clock.total_steps
    engine.sync_if_due()
    for step in range(first, run.steps):
        train_step(net, optimizer, batch_of(run, collective.worker, step))
        decay(run, optimizer)
        engine.after_step()
    engine.finish()
    return clone_state(net), first


@pytest.mark.parametrize(
    ("run", "workers"),
    [
        *(pytest.param(run, 3, id=name) for name, run in RUNS.items()),
        *(pytest.param(run, 3, id=f"{name}, seen by worker 0 alone") for name, run in ON_FIRST.items()),
        pytest.param(RUNS["travel, AdamW"], 1, id="one worker"),
    ],
)
def test_a_run_resumed_after_any_step_is_the_unbroken_run_bit_for_bit(run, workers):
    unbroken, _ = run_threads(train_and_save, workers, run)
    for step in STOPS:
        checkpoints = [found[step] for found, _ in unbroken]
        for (state, first), (_, final) in zip(
            run_threads(resume, workers, run, checkpoints, True)[0], unbroken, strict=True
        ):
            assert first == step + 1
            assert_equal_states(state, final, exactly=True)


def test_without_the_workers_own_files_a_run_goes_on_from_the_full_model():
    run = Run(one_holder(local_steps=2, batch_norm="running"), STEPS)
    unbroken, _ = run_threads(train_and_save, 2, run)
    checkpoints = [found[3] for found, _ in unbroken]  # a sync is due, after which momentum restarts: nothing is lost
    for state, first in run_threads(resume, 2, run, checkpoints, False)[0]:
        assert first == 4
        assert_equal_states(state, unbroken[0][1], exactly=True)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_checkpoint_resumes_with_another_number_of_workers(before, after):
    """From the full model, in the next round, with the partition of that many workers."""
    run = Run(one_holder(local_steps=2, batch_norm="running", momentum="travel"), STEPS)
    unbroken, _ = run_threads(train_and_save, before, run)
    results, _ = run_threads(resume, after, run, [found[2] for found, _ in unbroken], True)

    whole = unbroken[0][0][2][0]
    simulator = train_simulator(Run(run.config, 0), after)
    simulator.full = {name: tensor.clone() for name, tensor in whole.items()}
    simulator.clock.round = 2
    simulator._begin_round([{} for _ in simulator.workers])
    for step in range(3, STEPS):  # the unfinished round had one step, and is not completed
        for number, worker in enumerate(simulator.workers):
            train_step(worker.module, worker.optimizers[0], batch_of(run, number, step))
        simulator.after_step()
    expected = simulator.full_model().state_dict()
    for state, first in results:
        assert first == 3
        assert_equal_states(state, expected)
        assert_equal_states(state, results[0][0], exactly=True)
